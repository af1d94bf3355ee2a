"""The cells of the table of layouts: models and layouts, by the names that the table has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shared.architecture.architecture import (
    MLP,
    MTP,
    Architecture,
    Attention,
    Head,
    LatentAttention,
    Layer,
    MoE,
    Norm,
    Rotary,
)
from shared.architecture.attention import Alibi
from shared.architecture.embedding_and_head import Embedding, LearnedPositions
from shared.errors import UserError
from shared.families import registry
from shared.parallel import ParallelConfig, ranks_needed

LENGTH, VOCABULARY = 32, 300
NORM, EXPERT = Norm(epsilon=1e-5), MLP(ffn_hidden_size=48)
GQA = Attention(heads=8, groups=4, head_dim=16, rotary=Rotary(), qk_norm="head")
MLA = LatentAttention(
    heads=8,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    rotary=Rotary(),
)


def model(mixer: Attention | LatentAttention = GQA, mlp: MLP | MoE | None = None, **fields: Any) -> Architecture:
    """Four layers; `fields` of `Architecture`."""
    layer = Layer(mixer=mixer, mlp=mlp or MLP(ffn_hidden_size=96), norm=NORM)
    given = {"layers": (layer,) * 4, **fields}
    return Architecture(
        family="qwen3",
        hidden_size=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        head=Head(tied=False, norm=NORM),
        initializer_range=0.1,
        **given,
    )


def windows(layers: str = "wfwf") -> Architecture:
    """Windowed layers (w) with a theta of their own, and full attention (f), as Gemma 3."""
    full = Layer(mixer=GQA, mlp=MLP(ffn_hidden_size=96), norm=NORM)
    windowed = replace(full, mixer=replace(GQA, window=9, rotary=Rotary(theta=1000.0)))
    return model(layers=tuple(windowed if kind == "w" else full for kind in layers))


def moe(**fields: Any) -> Architecture:
    return model(mlp=MoE(experts=8, top_k=2, expert=EXPERT, **fields))


def delta_nets() -> Architecture:
    """Gated delta nets and attention layers, in turn, with dense MLPs."""
    tiny = registry.sizes()["qwen3-next-tiny"]
    of = replace(tiny, mtp=None, vocab_size=VOCABULARY).with_layers(
        lambda layer: replace(layer, mlp=MLP(ffn_hidden_size=96))
    )
    return replace(of, layers=of.layers * 2)


# Columns of the table.
MODELS = {
    "GQA": model(),
    "packed": model(),
    "windows": windows(),
    "windows, five layers": windows("wwfwf"),
    "ALiBi": model(replace(GQA, rotary=None, alibi=Alibi())),
    "learned positions": model(replace(GQA, rotary=None), embedding=Embedding(positions=LearnedPositions())),
    "sinks": model(replace(GQA, sinks=True, window=9)),
    "soft cap": model(replace(GQA, softcap=5.0)),
    "MLA": model(MLA),
    "MTP": model(mtp=MTP(depth=2, layer=Layer(mixer=GQA, mlp=MLP(ffn_hidden_size=96), norm=NORM))),
    "MoE, aux loss": moe(auxiliary_loss=0.02),
    "MoE, sequence aux loss": moe(auxiliary_loss=0.02, auxiliary_loss_over="sequence"),
    "MoE, correction bias, shared expert": moe(
        score="sigmoid", correction_bias=True, groups=4, top_groups=2, shared=MLP(ffn_hidden_size=64)
    ),
    "gated delta net": delta_nets(),
}
ONE_SEGMENT = ("GQA",)  # trained on rows of one segment, all other models on packed rows

AXES: dict[str, dict[str, dict[str, Any]]] = {
    "tensor": {
        "TP 2": {"tensor": 2},
        "TP 2 SP": {"tensor": 2, "sequence_parallel": True},
        "TP 2 SP ETP 1": {"tensor": 2, "sequence_parallel": True, "expert_tensor": 1},
    },
    "pipeline": {"PP 2": {"pipeline": 2}, "PP 2 VPP 2": {"pipeline": 2, "virtual_pipeline": 2}},
    "context": {"CP 2": {"context": 2}, "CP 2 heads": {"context": 2, "context_exchange": "heads"}},
    "expert": {"EP 2": {"expert": 2}},
    "data": {"DP 2": {}},
}
# Decoder layers of each pipeline chunk, of models of four and of five layers.
UNEVEN = {
    "PP 2, layers 1,3": {"pipeline": 2, "pipeline_layers": (1, 3)},
    "PP 3, layers 1,2,1": {"pipeline": 3, "pipeline_layers": (1, 2, 1)},
    "PP 2, layers 2,3": {"pipeline": 2, "pipeline_layers": (2, 3)},
    "PP 2, layers 3,2": {"pipeline": 2, "pipeline_layers": (3, 2)},
    "PP 2 VPP 2, layers 1,2,1,1": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (1, 2, 1, 1)},
    "TP 2 SP x PP 2, layers 3,1": {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "pipeline_layers": (3, 1)},
}
FOUR = {
    "TP 4 SP": {"tensor": 4, "sequence_parallel": True},
    "PP 4": {"pipeline": 4},
    "CP 4": {"context": 4},
    "CP 4 heads": {"context": 4, "context_exchange": "heads"},
    "EP 4": {"expert": 4},
    "DP 4": {},
}


def _layouts() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and fields of every single layout, of every pair of two axes, and of uneven pipeline stages."""
    axes = list(AXES.values())
    for axis in axes:
        yield from axis.items()
    for index, first in enumerate(axes):
        for second in axes[index + 1 :]:
            for name, fields in first.items():
                if name == "TP 2":  # pairs are of TP with SP, which MoE, MLA and delta nets need
                    continue
                for other, more in second.items():
                    yield f"{name} x {other}", {**fields, **more}
    yield from FOUR.items()
    yield from UNEVEN.items()


def _processes(name: str, fields: dict[str, Any]) -> int:
    sizes = {each: fields.get(each, 1) for each in ("tensor", "pipeline", "context", "expert")}
    copies = int(name.rpartition("DP ")[2]) if "DP " in name else 1
    return copies * ranks_needed(expert_tensor=fields.get("expert_tensor"), **sizes)


LAYOUTS: dict[str, ParallelConfig] = {
    name: ParallelConfig(processes=_processes(name, fields), **fields) for name, fields in _layouts()
}


def refusal(model: str, layout: str) -> str | None:
    """Why the layout is refused for the model; None where it is legal."""
    architecture, parallel = MODELS[model], LAYOUTS[layout]
    if parallel.expert_tensor is not None and architecture.moe is None:
        return "--expert-tensor-parallel is for MoE"
    try:
        parallel.check_model(architecture)
    except UserError as error:
        return str(error)
    return None
