"""Greedy continuation and log-probabilities in vLLM and in transformers, in a fork of the launcher.

    family_worker.py DIRECTORY [exchange] [engine]

vLLM loads DIRECTORY, the export; transformers loads DIRECTORY.source, the model as its family publishes it. Writes
DIRECTORY.json: both continuations and the log-probability of every given token, or the reason why `infer` refuses the model. With
`exchange` the engine takes other weights, as by `infer reload`, and those of DIRECTORY again. With `engine` our engine on
transformers continues, too. Where vLLM lacks a model that transformers has, `infer generate` does.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.errors import UserError
from shared.families import registry
from shared.families.common.transformers_workarounds import with_workarounds
from tests.tools.infer import multimodal
from tests.tools.infer.family_engines import of_engine, of_generate
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.transformers import has_class
from tools.infer.engines.vllm import load
from tools.infer.engines.vllm_arguments import engine_arguments
from tools.infer.engines.vllm_support import check_exchange, check_supported, model_config
from tools.infer.engines.weight_swap import WeightSwap
from tools.infer.weight_check import ServedWeights

GIVEN, CONTINUED = 224, 24  # tokens: beyond the windows and original lengths of tiny sizes
LIKELY = 5  # tokens at each place of a continuation, with their log-probabilities


def of_transformers(source: Path, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind, config = AutoModelForCausalLM, read_config(source / "config.json")
    if code := config.get("auto_map"):  # by name: vLLM registers configurations of its own in transformers
        kind = get_class_from_dynamic_module(code["AutoModelForCausalLM"], source)
    attention = "sdpa" if config.get("alibi") else "eager"  # transformers' eager Falcon adds ALiBi twice
    # of MPT's class, which ignores a field: docs/upstream.md
    model = with_workarounds(kind.from_pretrained(source, dtype=dtype, attn_implementation=attention).eval())
    with torch.no_grad():
        for _ in range(CONTINUED):  # without a KV cache, which tests/references do not have
            logits = model(ids).logits.float()
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    known = logits[0, : GIVEN - 1].log_softmax(-1).gather(-1, ids[0, 1:GIVEN, None])
    chosen = logits[0, GIVEN - 1 :].log_softmax(-1).topk(LIKELY)
    likely = [
        dict(zip(numbers, values, strict=True))
        for numbers, values in zip(chosen.indices.tolist(), chosen.values.tolist(), strict=True)
    ]
    return {"tokens": ids[0, GIVEN:].tolist(), "log_probabilities": known[:, 0].tolist(), "likely": likely}


def of_vllm(
    source: Path, arguments: dict[str, Any], ids: list[int], has_images: bool, other: Path | None
) -> dict[str, Any]:
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(
        temperature=0.0, max_tokens=CONTINUED, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    llm = load(arguments | ({"worker_extension_cls": WeightSwap.path} if other else {}))

    def continued() -> dict[str, Any]:
        (answer,) = llm.generate([TokensPrompt(prompt_token_ids=ids)], sampling, use_tqdm=False)
        given = zip(answer.prompt_logprobs[1:], ids[1:], strict=True)
        known = [position[token].logprob for position, token in given]
        return {"tokens": list(answer.outputs[0].token_ids), "log_probabilities": known}

    found = continued() | ({"seen": multimodal.of_vllm(llm, source, sampling)} if has_images else {})
    if other:
        served = ServedWeights.read(source)
        check_exchange(llm.llm_engine.vllm_config, "--reload-from")
        for name, path in (("other", other), ("again", source)):
            files = [(file.path, file.size, file.modified) for file in served.check(path)]
            assert llm.collective_rpc(WeightSwap.baton_open.__name__, args=(files,)) == [""]
            llm.collective_rpc(WeightSwap.baton_swap.__name__)
            assert llm.reset_prefix_cache()
            found[name] = continued()
    return found


def with_other_weights(source: Path) -> Path:
    """A directory like `source` with noise on every weight."""
    other = source.with_name(f"{source.name}.other")
    other.mkdir()
    for path in (source / "config.json", *source.glob("generation_config.json"), *source.glob("*.py")):
        shutil.copy(path, other)
    noise = torch.Generator().manual_seed(2)
    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            scale = 0.2 * float(tensor.float().square().mean().sqrt())
            weights[name] = tensor + scale * torch.randn(tensor.shape, generator=noise).to(tensor.dtype)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


def both(source: Path, exchange: bool, engine: bool) -> dict[str, Any]:
    config = read_config(source / "config.json")
    original = source.with_name(f"{source.name}.source")
    has_images = "vision_config" in config

    def given(first: int) -> torch.Tensor:
        vocabulary = registry.language_config(config)["vocab_size"]
        return torch.randint(first, vocabulary, (1, GIVEN), generator=torch.Generator().manual_seed(1))

    try:
        check_supported(source)
    except UserError as error:
        answer = {"lacking": str(error).replace(f"--source {source}: ", "")}
        if has_class(source):
            answer["transformers"] = of_transformers(original, given(0), torch.float32)
            answer["generate"] = of_generate(source, given(0)[0].tolist(), CONTINUED)
        return answer
    length = CONTINUED + max(GIVEN, multimodal.write_processor(source) if has_images else 0)
    if has_images:
        (source / "manifest.json").unlink()  # it lists the files without the processor's
    precision = "bf16" if "linear_key_head_dim" in config else "fp32"  # vLLM's CPU kernels of delta nets are bf16 only
    arguments = engine_arguments(source, EngineSettings(precision=precision, max_model_len=length, batch_size=1))
    arguments |= {"skip_tokenizer_init": not has_images, "trust_remote_code": "auto_map" in config}
    if has_images:  # `infer` refuses images on CPU; here they check the weights of the vision tower
        arguments["limit_mm_per_prompt"] = {"image": 1}
    if config["model_type"] == "cohere2":  # vLLM's windows are one token wider than config.json says
        arguments["hf_overrides"] = {"sliding_window": config["sliding_window"] - 1}
    model_config(arguments)
    ids = given(len(multimodal.TOKENS) if has_images else 0)
    theirs = of_transformers(original, ids, torch.float32)
    answer = {"precision": precision, "transformers": theirs}
    if engine and has_class(source) and not has_images:
        answer["engine"] = of_engine(source, ids[0].tolist(), CONTINUED)
    if has_images:
        theirs["seen"] = multimodal.of_transformers(source)
        theirs["unseen"] = multimodal.of_transformers(source, blank=True)
    if precision == "bf16":
        answer["rounded"] = of_transformers(original, ids, torch.bfloat16)
    other = with_other_weights(source) if exchange else None
    if other:  # before vLLM, whose Transformers backend decorates transformers' classes
        answer["other"] = of_transformers(other, ids, torch.float32)
    try:
        return answer | {"vllm": of_vllm(source, arguments, ids[0].tolist(), has_images, other)}
    except UserError as error:
        return {"refused": str(error).replace(f"--source {source}: ", "")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    found = both(directory, exchange="exchange" in sys.argv[2:], engine="engine" in sys.argv[2:])
    directory.with_name(f"{directory.name}.json").write_text(json.dumps(found))
