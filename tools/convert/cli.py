"""The `convert` command: checkpoints between Hugging Face, Megatron-Core and TransformerEngine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from shared.cli import ExistingDir, ExistingFile, NonNegative, Positive, Seed, Tool
from shared.precision import Precision

tool = Tool(
    "convert",
    summary="Convert checkpoints between Hugging Face, Megatron-Core and TransformerEngine, bit for bit.",
)

Workers = Annotated[int, Field(ge=1, le=256)]  # threads; each holds its own blocks

Names = tuple[str, ...]


@tool.command
def init(
    target: Path,
    size: str | None = None,
    model_config: ExistingFile | None = None,
    tokenizer: ExistingDir | None = None,
    max_position_embeddings: Positive | None = None,
    ignore_config_field: Names = (),
    dtype: Precision = "bf16",
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Initialise a Hugging Face checkpoint with random weights.

    Initialisation is transformers': normal with the family's initializer_range, norms 1, biases 0. `convert families`
    lists the named sizes.

    Args:
        target: the directory to publish.
        size: a named size: llama-20m, qwen3-8b, ...
        model_config: a config.json, instead of a named size.
        tokenizer: a directory with tokenizer.json; copied, and vocabulary size and special tokens taken from it.
        max_position_embeddings: context length in tokens; the size's by default.
        ignore_config_field: fields of config.json, separated by commas, that are unknown here and change nothing; they are
            carried and recorded in the manifest. Other unknown fields are errors.
        dtype: dtype of the weights.
        seed: seed of the initialisation.
        overwrite: replace the target of an earlier run.
    """
    from tools.convert.init import run

    run(target, size, model_config, tokenizer, max_position_embeddings, ignore_config_field, dtype, seed, overwrite)


@tool.command(not_fingerprinted=("workers", "shard"))
def to_megatron(
    source: ExistingDir,
    target: Path,
    hf_files: ExistingDir | None = None,
    ignore_config_field: Names = (),
    strip_prefix: str | None = None,
    overwrite: bool = False,
    workers: Workers | None = None,
    shard: str | None = None,
) -> None:
    """Convert a Hugging Face directory to Megatron-Core.

    The result is a torch_dist checkpoint for any TP, PP and EP size; hf/ holds config.json, the tokenizer and the
    source's other files. No model is built; memory stays at tens of megabytes. A missing, unknown or misshapen tensor is
    an error.

    Args:
        source: a Hugging Face directory, or GLM-130B's SwissArmyTransformer checkpoint (a file per rank).
        target: the directory to publish.
        hf_files: a directory with config.json and tokenizer, for a SwissArmyTransformer source.
        ignore_config_field: fields of config.json, separated by commas, that are unknown here and change nothing; they are
            carried and recorded in the manifest. Other unknown fields are errors.
        strip_prefix: what a wrapper left in front of tensor names or of a part of them (module., _orig_mod., pretrained_model.);
            the result and to-hf have the plain names. TRL's value head (v_head.) beside the model is left out.
        overwrite: replace the target of an earlier run.
        workers: threads; by default one per processor, at most 8. The result does not depend on it.
        shard: one of several processes on a shared file system: 1/4 to 4/4 each write their share of the files, publish/4
            joins them. The result does not depend on it.
    """
    from shared.checkpoint.directory.sharded_publish import ShardSpec
    from tools.convert.to_megatron import run

    run(
        source,
        target,
        hf_files,
        ignore_config_field,
        strip_prefix,
        overwrite,
        workers,
        ShardSpec.parse(shard) if shard else None,
    )


@tool.command(not_fingerprinted=("workers", "shard"))
def to_te(
    source: ExistingDir,
    target: Path,
    hf_files: ExistingDir | None = None,
    ignore_config_field: Names = (),
    strip_prefix: str | None = None,
    overwrite: bool = False,
    workers: Workers | None = None,
    shard: str | None = None,
) -> None:
    """Convert a Hugging Face directory to the parameters of TransformerEngine's modules.

    The result is safetensors files under transformer_engine's parameter names, and layers.json with the constructor
    arguments of each layer. A layer that TransformerLayer does not support is split into smaller modules; layers.json
    gives the reason.

    Args:
        source: a Hugging Face directory, or GLM-130B's SwissArmyTransformer checkpoint (a file per rank).
        target: the directory to publish.
        hf_files: a directory with config.json and tokenizer, for a SwissArmyTransformer source.
        ignore_config_field: fields of config.json, separated by commas, that are unknown here and change nothing; they are
            carried and recorded in the manifest. Other unknown fields are errors.
        strip_prefix: what a wrapper left in front of tensor names or of a part of them (module., _orig_mod., pretrained_model.);
            the result and to-hf have the plain names. TRL's value head (v_head.) beside the model is left out.
        overwrite: replace the target of an earlier run.
        workers: threads; by default one per processor, at most 8. The result does not depend on it.
        shard: one of several processes on a shared file system: 1/4 to 4/4 each write their share of the files, publish/4
            joins them. The result does not depend on it.
    """
    from shared.checkpoint.directory.sharded_publish import ShardSpec
    from tools.convert.to_te import run

    run(
        source,
        target,
        hf_files,
        ignore_config_field,
        strip_prefix,
        overwrite,
        workers,
        ShardSpec.parse(shard) if shard else None,
    )


@tool.command(not_fingerprinted=("workers", "shard"), added=("base",))
def to_hf(
    source: ExistingDir,
    target: Path,
    dtype: Precision | None = None,
    hf_files: ExistingDir | None = None,
    family: str | None = None,
    iteration: NonNegative | None = None,
    quantized: bool = False,
    base: ExistingDir | None = None,
    ignore_config_field: Names = (),
    overwrite: bool = False,
    workers: Workers | None = None,
    shard: str | None = None,
) -> None:
    """Convert a Megatron or TransformerEngine directory, converted or trained, to Hugging Face.

    Shards and dtypes are the original checkpoint's: unchanged weights come back byte for byte. Of a run in progress, the
    latest saved iteration is converted. Quantised weights are written as bfloat16, with --quantized in their original
    scheme. Of a run with LoRA, a PEFT adapter is written: adapter_config.json and adapter_model.safetensors.

    Args:
        source: a directory of kind megatron or te.
        target: the directory to publish.
        dtype: dtype of every weight; by default each tensor's dtype in the original checkpoint.
        hf_files: a directory with config.json and tokenizer, for a source without hf/.
        family: write config.json and tensor names of an equivalent family, for programs without the model's own: llama
            for Baichuan-7B, Baichuan2-7B (head rows divided by their L2 norms), InternLM, InternLM2 and Yi; qwen2 for
            Qwen 1. A feature that the other family lacks is an error. With the model's own family: config.json in
            today's transformers names.
        iteration: a kept iteration of a training run; by default the newest.
        quantized: quantise the weights that the original checkpoint stored quantised: unchanged blocks byte for byte,
            changed blocks with new scales.
        base: of a run with LoRA: the Hugging Face directory of its base, which the adapter names by its relative path.
        ignore_config_field: fields of config.json, separated by commas, that are unknown here and change nothing; they are
            carried and recorded in the manifest. Other unknown fields are errors.
        overwrite: replace the target of an earlier run.
        workers: threads; by default one per processor, at most 8. The result does not depend on it.
        shard: one of several processes on a shared file system: 1/4 to 4/4 each write their share of the files, publish/4
            joins them. The result does not depend on it.
    """
    from shared.checkpoint.directory.sharded_publish import ShardSpec
    from tools.convert.to_hf import run

    part = ShardSpec.parse(shard) if shard else None
    if base is not None:
        from tools.convert.to_peft import publish_adapter

        refused = {"dtype": dtype, "hf-files": hf_files, "family": family, "quantized": quantized, "shard": shard}
        publish_adapter(source, target, base, refused, overwrite, iteration)
        return
    run(source, target, dtype, hf_files, family, ignore_config_field, overwrite, workers, part, quantized, iteration)


@tool.command(not_fingerprinted=("workers",))
def merge_lora(
    source: ExistingDir,
    adapter: ExistingDir,
    target: Path,
    ignore_config_field: Names = (),
    overwrite: bool = False,
    workers: Workers | None = None,
) -> None:
    """Merge a PEFT LoRA adapter into its base model, a Hugging Face directory.

    Tensors without an adapter stay byte for byte. No model is built; memory stays at tens of megabytes. A missing, unknown
    or misshapen adapter tensor and an unsupported setting are errors.

    Args:
        source: the base model: a Hugging Face directory.
        adapter: a directory with adapter_config.json and adapter_model.safetensors (or .bin).
        target: the directory to publish.
        ignore_config_field: fields of config.json, separated by commas, that are unknown here and change nothing; they are
            carried and recorded in the manifest. Other unknown fields are errors.
        overwrite: replace the target of an earlier run.
        workers: threads; by default one per processor, at most 8. The result does not depend on it.
    """
    from tools.convert.merge_lora import run

    run(source, adapter, target, ignore_config_field, overwrite, workers)


@tool.command(positional=("source",))
def inspect(source: ExistingDir, tensors: bool = False, scan: bool = False, json: bool = False) -> None:
    """Print a checkpoint's kind, family, architecture, tensors, dtypes and origin.

    Only headers are read, except with --scan.

    Args:
        source: a directory of kind hf, megatron or te.
        tensors: list every tensor with dtype and shape.
        scan: read every weight and report NaN and infinity; exit 1 if there are any.
        json: print JSON.
    """
    from tools.convert.inspect import run

    run(source, tensors, scan, json)


@tool.command
def verify(
    source: ExistingDir,
    target: ExistingDir,
    certificate: Path | None = None,
    logits: bool = True,
    positions: Annotated[int, Field(ge=256, le=2**31 - 1)] = 512,
    seed: Seed = 0,
    trust_remote_code: bool = False,
    hf_files: ExistingDir | None = None,
) -> None:
    """Compare a Megatron or TransformerEngine directory with its Hugging Face source: bits, files and logits.

    Every tensor is converted back and compared bit for bit, and so are config.json and the auxiliary files. Then logits
    of the Megatron-Core model are compared with transformers' in fp32 on random tokens (not for TransformerEngine, whose
    modules need a GPU). Exit 1 on any difference. The result is a JSON certificate.

    Args:
        source: the Hugging Face directory; for a run with LoRA the PEFT directory that to-hf --base made of it.
        target: the directory of kind megatron or te converted from it, or a run with LoRA.
        certificate: file of the result; by default TARGET.certificate.json beside the target.
        logits: compare logits too, which builds both models.
        positions: length of the random sequence in tokens, at most the model's context length.
        seed: seed of the random tokens.
        trust_remote_code: run the modelling code in the source directory for its logits; needed for a model class that
            transformers lacks.
        hf_files: --hf-files of to-megatron, if it had one.
    """
    from tools.convert.verify import run

    run(source, target, certificate, logits, positions, seed, trust_remote_code, hf_files)


@tool.command
def families(markdown: bool = False, json: bool = False) -> None:
    """List the supported model families, the named sizes of `convert init`, and the recorded test results.

    Results carry date, revision and library versions. A family changed since then is marked as changed.

    Args:
        markdown: print Markdown.
        json: print JSON, with the results of every size.
    """
    from tools.convert.families import run

    run(markdown, json)


def main() -> None:
    """Console script."""
    tool.run()


if __name__ == "__main__":
    main()
