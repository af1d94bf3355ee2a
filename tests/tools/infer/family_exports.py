"""Exports of tiny models of families, made in convert's environment: Hugging Face -> Megatron -> Hugging Face, in fp32.

`family_exports.py FOLDER SIZE...` writes FOLDER/SIZE for each size. A SIZE of `yi-tiny=llama` is exported as another family.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

from shared.architecture.architecture import MLP, Architecture, Attention, Layer, MoE, Rotary
from shared.families import registry
from tools.convert.cli import tool

write_hf = runpy.run_path(str(Path(__file__).parents[1] / "convert" / "conftest.py"))["write_hf"]
HEAD_DIM = 32  # the smallest that vLLM's CPU attention is compiled for


def servable(a: Architecture) -> Architecture:
    """The same model with head sizes that vLLM's CPU kernels have, and the sizes that follow from them."""
    if a.mla:  # the published dimensions only; within attention vLLM's norms have the model's epsilon
        published = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        return a.with_values(attention=published, norm={"epsilon": a.mla.norm_epsilon})
    if a.delta_net and a.moe:
        # the published dimensions, in bf16 only; with all experts chosen, rounding cannot choose others
        published = {"key_head_dim": 128, "value_head_dim": 128, "conv_kernel": 4}
        a = a.with_values(delta_net=published, moe={"top_k": a.moe.experts})
    times = HEAD_DIM // a.attention.head_dim
    hidden = a.hidden_size * times

    def wider(layer: Layer) -> Layer:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, Attention):
            rotary = mixer.rotary and wider_rotary(mixer.rotary)
            mixer = replace(mixer, head_dim=mixer.head_dim * times, rotary=rotary)
        if isinstance(mlp, MLP) and not mlp.gated:
            mlp = replace(mlp, ffn_hidden_size=4 * hidden)  # vLLM's Falcon computes it, whatever config.json says
        if isinstance(mlp, MoE) and mlp.expert.clamp:
            mlp = replace(mlp, expert=replace(mlp.expert, clamp=7.0))  # vLLM's gpt-oss, whatever config.json says
        return replace(layer, mixer=mixer, mlp=mlp)

    def wider_rotary(rotary: Rotary) -> Rotary:
        scaling = rotary.scaling
        if scaling and scaling.short_factors:
            names = ("short_factors", "long_factors")
            factors = {name: tuple(f for f in getattr(scaling, name) for _ in range(times)) for name in names}
            # vLLM reads the factor as the ratio of lengths, which it is in every published configuration
            scaling = replace(scaling, factor=a.max_position_embeddings / scaling.original_length, **factors)
        return replace(rotary, dim=rotary.dim and rotary.dim * times, scaling=scaling)

    wide = replace(a.with_layers(wider), hidden_size=hidden)
    return registry.from_config(registry.to_config(wide))  # fields that a family's config.json derives from others


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
