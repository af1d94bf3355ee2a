"""Which attention back end each kind of layer will use, known before a model is built."""

from __future__ import annotations

import torch

from shared.architecture.architecture import Architecture, Attention, LatentAttention
from shared.kernels.attention.choose import choose
from shared.kernels.attention.names import AttentionBackend
from shared.kernels.attention.needs import Needs, capability_of
from shared.parallel import ParallelConfig


def attention_plan(
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelConfig,
    sequence_length: int,
    packed: bool,
    name: AttentionBackend | None,
) -> list[str]:
    """One line for each kind of attention layer: the back end, and what the layer needs.

    Args:
        architecture: the model.
        dtype: of the model.
        device: that it will be on.
        parallel: ranks that share the heads or the sequence.
        sequence_length: tokens of a row.
        packed: whether rows have several segments.
        name: the back end; None: chosen.

    Raises:
        UserError: the named back end does not carry a layer's attention.
    """
    mtp = [architecture.mtp.layer] if architecture.mtp else []
    lines = []
    for layer in (*architecture.kinds, *mtp):
        if isinstance(layer.mixer, Attention | LatentAttention):
            needs = _needs(
                architecture,
                layer.mixer,
                dtype=dtype,
                device=device,
                parallel=parallel,
                sequence_length=sequence_length,
                packed=packed,
            )
            features = ", ".join(needs.features)
            lines.append(choose(needs, name) + (f" ({features})" if features else ""))
    return list(dict.fromkeys(lines))


def _needs(
    architecture: Architecture,
    mixer: Attention | LatentAttention,
    *,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelConfig,
    sequence_length: int,
    packed: bool,
) -> Needs:
    """What a layer needs in training."""
    plain = mixer if isinstance(mixer, Attention) else None
    by_heads = parallel.context_exchange == "heads"
    ranks = parallel.tensor * (parallel.context if by_heads else 1)  # that share the heads
    parts = 1 if by_heads or parallel.context == 1 else 2 * parallel.context  # chunks of a row
    return Needs(
        device=device.type,
        capability=capability_of(device),
        dtype=dtype,
        query_length=sequence_length // parts,
        key_length=sequence_length,
        heads=mixer.heads // ranks,
        groups=max(mixer.groups // ranks, 1),
        head_dim=mixer.head_dim,
        value_dim=mixer.head_dim if isinstance(mixer, Attention) else mixer.v_head_dim,
        packed=packed and not architecture.prefix,
        prefix=architecture.prefix is not None,
        window=plain is not None and plain.window is not None and plain.window < sequence_length,
        alibi=plain is not None and plain.alibi is not None,
        rounded_alibi=plain is not None and plain.alibi is not None and plain.alibi.rounded,
        softcap=plain is not None and plain.softcap is not None,
        sinks=plain is not None and plain.sinks,
        dropout=mixer.dropout > 0.0,
    )
