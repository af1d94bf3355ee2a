"""Exports of tiny models of families, made in convert's environment: Hugging Face -> Megatron -> Hugging Face, in fp32.

Run as `family_exports.py FOLDER SIZE...`; each size's export is FOLDER/SIZE. SIZE may be `yi-tiny=llama`: as another family.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.families import registry
from tools.convert.cli import tool

write_hf = runpy.run_path(str(Path(__file__).parents[1] / "convert" / "conftest.py"))["write_hf"]
HEAD_DIM = 32  # the smallest that vLLM's attention on the CPU is compiled for


def servable(a: Architecture) -> Architecture:
    """The same with heads of a size that vLLM's kernels have, everything that hangs on it in proportion."""
    if a.latent:  # its kernels know the published sizes alone, and its norms within attention the model's epsilon
        latent = replace(a.latent, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
        return replace(a, latent=latent, head_dim=192, norm_epsilon=latent.norm_epsilon)
    if a.delta and a.experts:  # likewise, and in bf16: every expert is used, so that rounding does not choose others
        delta = replace(a.delta, key_head_dim=128, value_head_dim=128, conv_kernel=4)
        a = replace(a, delta=delta, experts=replace(a.experts, top_k=a.experts.count))
    if a.glu_limit:
        a = replace(a, glu_limit=7.0)  # gpt-oss's, which vLLM takes whatever is configured
    times = HEAD_DIM // a.head_dim
    changes = {name: getattr(a, name) * times for name in ("head_dim", "hidden_size", "rotary_dim") if getattr(a, name)}
    if not a.gated:
        changes["ffn_hidden_size"] = (
            4 * changes["hidden_size"]
        )  # vLLM's Falcon takes it for that, whatever is configured
    if a.rope_scaling and a.rope_scaling.short_factors:
        factors = {name: getattr(a.rope_scaling, name) for name in ("short_factors", "long_factors")}
        wider = {name: tuple(f for f in known for _ in range(times)) for name, known in factors.items()}
        # vLLM takes the factor for that of the lengths, as it is in every published configuration
        factor = a.max_position_embeddings / a.rope_scaling.original_length
        changes["rope_scaling"] = replace(a.rope_scaling, factor=factor, **wider)
    # where the family makes one size of others, as its configuration says
    return registry.from_config(registry.to_config(replace(a, **changes)))


def call(*words: str | Path) -> None:
    try:
        tool.run([str(word) for word in words])
    except SystemExit as end:
        if end.code:
            raise


def main(folder: Path, sizes: list[str]) -> None:
    for size in sizes:
        name, _, family = size.partition("=")
        source, megatron = folder / f"{size}.source", folder / f"{size}.megatron"
        write_hf(source, servable(registry.sizes()[name]), dtype="fp32")
        call("to-megatron", "--source", source, "--target", megatron)
        call("to-hf", "--source", megatron, "--target", folder / size, *(("--family", family) if family else ()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
