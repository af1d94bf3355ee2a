"""The `convert` command: checkpoints between Hugging Face, Megatron-Core and TransformerEngine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from shared.cli import ExistingDir, ExistingFile, NonNegative, Positive, Tool
from shared.precision import Precision

tool = Tool(
    "convert",
    summary="Convert checkpoints between Hugging Face, Megatron-Core and TransformerEngine, and prove it lossless.",
)

Workers = Annotated[int, Field(ge=1, le=256)]  # each has blocks of its own in memory


@tool.command
def init(
    target: Path,
    size: str | None = None,
    model_config: ExistingFile | None = None,
    tokenizer: ExistingDir | None = None,
    max_position_embeddings: Positive | None = None,
    dtype: Precision = "bf16",
    seed: NonNegative = 0,
    overwrite: bool = False,
) -> None:
    """Make a Hugging Face checkpoint with random weights, to pretrain from.

    Weights are drawn as transformers draws them: normal with the family's standard deviation, norms one, biases zero.
    `convert families` lists the named sizes.

    Args:
        target: the directory to publish.
        size: a named size, such as llama-20m or qwen3-8b.
        model_config: a config.json to follow instead of a named size.
        tokenizer: a directory with tokenizer.json; copied, and the vocabulary and special tokens taken from it.
        max_position_embeddings: longest sequence the model is for, in tokens; the size's own by default.
        dtype: type of the weights.
        seed: of the random numbers.
        overwrite: replace what another run published at the target.
    """
    from tools.convert.init import run

    run(target, size, model_config, tokenizer, max_position_embeddings, dtype, seed, overwrite)


@tool.command(not_fingerprinted=("workers", "shard"))
def to_megatron(
    source: ExistingDir,
    target: Path,
    hf_files: ExistingDir | None = None,
    overwrite: bool = False,
    workers: Workers | None = None,
    shard: str | None = None,
) -> None:
    """Convert a Hugging Face directory into a Megatron directory.

    The result is a torch_dist checkpoint that Megatron-Core loads at any tensor- and pipeline-parallel size, with the
    configuration, the tokenizer and every other file of the source in hf/. No model is built; memory stays at tens of
    megabytes. A tensor that is missing, unknown or misshapen stops it.

    Args:
        source: a Hugging Face directory, or GLM-130B's of a file for each rank, written by SwissArmyTransformer.
        target: the directory to publish.
        hf_files: a directory with config.json and tokenizer, for a source that lacks them: SwissArmyTransformer's ranks.
        overwrite: replace what another run published at the target.
        workers: threads that read and write; by default one for each processor, at most 8. The result is the same.
        shard: write one part of several, 1/4 to 4/4, in as many processes on machines that share the target's file
            system; when all are done, publish/4 makes the directory of them. The result is the same.
    """
    from shared.checkpoint.directory.sharded_publish import ShardSpec
    from tools.convert.to_megatron import run

    run(source, target, hf_files, overwrite, workers, ShardSpec.parse(shard) if shard else None)


@tool.command(not_fingerprinted=("workers", "shard"))
def to_te(
    source: ExistingDir,
    target: Path,
    hf_files: ExistingDir | None = None,
    overwrite: bool = False,
    workers: Workers | None = None,
    shard: str | None = None,
) -> None:
    """Convert a Hugging Face directory into a directory of TransformerEngine's parameters.

    The result is safetensors files with the names that transformer_engine's modules give their parameters, and
    layers.json with the arguments that each layer is made with. A layer that TransformerLayer cannot compute is a set
    of smaller modules, and layers.json says why.

    Args:
        source: a Hugging Face directory, or GLM-130B's of a file for each rank, written by SwissArmyTransformer.
        target: the directory to publish.
        hf_files: a directory with config.json and tokenizer, for a source that lacks them: SwissArmyTransformer's ranks.
        overwrite: replace what another run published at the target.
        workers: threads that read and write; by default one for each processor, at most 8. The result is the same.
        shard: write one part of several, 1/4 to 4/4, in as many processes on machines that share the target's file
            system; when all are done, publish/4 makes the directory of them. The result is the same.
    """
    from shared.checkpoint.directory.sharded_publish import ShardSpec
    from tools.convert.to_te import run

    run(source, target, hf_files, overwrite, workers, ShardSpec.parse(shard) if shard else None)


@tool.command(not_fingerprinted=("workers", "shard"))
def to_hf(
    source: ExistingDir,
    target: Path,
    dtype: Precision | None = None,
    hf_files: ExistingDir | None = None,
    family: str | None = None,
    quantized: bool = False,
    overwrite: bool = False,
    workers: Workers | None = None,
    shard: str | None = None,
) -> None:
    """Convert a Megatron or TransformerEngine directory, converted or trained, into a Hugging Face directory.

    Shards and types are those of the Hugging Face directory it once came from: unchanged weights come back byte for
    byte. A run that is still training may be read; its latest saved iteration is taken. Weights that were quantised
    there are written as bfloat16, unless --quantized asks for their old form.

    Args:
        source: a directory of kind megatron or te.
        target: the directory to publish.
        dtype: type of every weight; by default each tensor's type in the original checkpoint.
        hf_files: a directory with config.json and tokenizer, for a directory that has no hf/.
        family: write the configuration and the tensor names of another family that computes the same, for programs
            that lack the model's own: llama for Baichuan-7B, Baichuan2-7B (the rows of its head divided by their lengths),
            InternLM, InternLM2 and Yi, qwen2 for Qwen 1. What the other family cannot say is refused by name. The model's
            own: its configuration as it is spelt today.
        quantized: write the weights that the original checkpoint stored quantised so again: unchanged ones as they
            were, byte for byte, changed ones with new scales.
        overwrite: replace what another run published at the target.
        workers: threads that read and write; by default one for each processor, at most 8. The result is the same.
        shard: write one part of several, 1/4 to 4/4, in as many processes on machines that share the target's file
            system; when all are done, publish/4 makes the directory of them. The result is the same.
    """
    from shared.checkpoint.directory.sharded_publish import ShardSpec
    from tools.convert.to_hf import run

    part = ShardSpec.parse(shard) if shard else None
    run(source, target, dtype, hf_files, family, overwrite, workers, part, quantized)


@tool.command(not_fingerprinted=("workers",))
def merge_lora(
    source: ExistingDir,
    adapter: ExistingDir,
    target: Path,
    overwrite: bool = False,
    workers: Workers | None = None,
) -> None:
    """Merge a LoRA adapter of PEFT into the Hugging Face directory that it was trained on.

    The result is a Hugging Face directory like the source, with the matrices that the adapter changes changed, and
    every other byte as it was. No model is built; memory stays at tens of megabytes. A tensor of the adapter that is
    missing, unknown or misshapen, and a setting of it that is not merged here, stop it.

    Args:
        source: the base: a Hugging Face directory.
        adapter: a directory with adapter_config.json and adapter_model.safetensors (or .bin).
        target: the directory to publish.
        overwrite: replace what another run published at the target.
        workers: threads that read and write; by default one for each processor, at most 8. The result is the same.
    """
    from tools.convert.merge_lora import run

    run(source, adapter, target, overwrite, workers)


@tool.command(positional=("source",))
def inspect(source: ExistingDir, tensors: bool = False, scan: bool = False, json: bool = False) -> None:
    """Say what a checkpoint directory is: kind, family, architecture, tensors, types, origin.

    Only headers are read, unless --scan is given.

    Args:
        source: a directory of kind hf, megatron or te.
        tensors: list every tensor with its type and shape.
        scan: read every weight and report NaN and infinity; exits 1 if there is any.
        json: print JSON instead of a table.
    """
    from tools.convert.inspect import run

    run(source, tensors, scan, json)


@tool.command
def verify(
    source: ExistingDir,
    target: ExistingDir,
    certificate: Path | None = None,
    logits: bool = True,
    positions: Annotated[int, Field(ge=256)] = 512,
    seed: NonNegative = 0,
    trust_remote_code: bool = False,
    hf_files: ExistingDir | None = None,
) -> None:
    """Prove that a Megatron or TransformerEngine directory is a Hugging Face directory: bits, files and logits.

    Every tensor is brought back and compared bit for bit, every field of config.json and every other file too; then
    the Megatron-Core model's logits are compared with those of transformers on the same random tokens, in fp32 (not
    for TransformerEngine's form, whose modules need GPUs).
    Exits 1 if anything differs. The certificate says what was compared.

    Args:
        source: the Hugging Face directory.
        target: the directory of kind megatron or te made of it.
        certificate: where to write the result; by default beside the target, as TARGET.certificate.json.
        logits: compare logits, which builds the model, rather than bits and files only.
        positions: length of the random sequence, in tokens; the model's longest if that is less.
        seed: of the random tokens.
        trust_remote_code: compute the source's logits by the modelling code that lies in the directory, which is run
            then; needed where transformers does not have the model's class.
        hf_files: what to-megatron was given as --hf-files.
    """
    from tools.convert.verify import run

    run(source, target, certificate, logits, positions, seed, trust_remote_code, hf_files)


@tool.command
def families(markdown: bool = False, json: bool = False) -> None:
    """List the supported model families, the sizes that `convert init` knows by name, and what tests proved of them.

    The proofs are those that were recorded last, with their date, revision and versions; a family that has changed
    since then is said to have, whatever was proven of it before.

    Args:
        markdown: print Markdown.
        json: print JSON, with the proofs of every size.
    """
    from tools.convert.families import run

    run(markdown, json)


def main() -> None:
    """Console script."""
    tool.run()


if __name__ == "__main__":
    main()
