"""Routers of MoE: Megatron-Core's, with statistics of their load, padding left out, biases, and other group scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.architecture.architecture import MoE


class Router(TopKRouter):
    """Megatron-Core's router, which counts the tokens of each expert and keeps its balancing loss.

    With `padding_mask`, padding is left out of the load, of the balancing loss and of the correction bias. It is routed and
    computed all the same. In three places Megatron-Core's own router does not do that:

    - the counts of the correction bias are masked with a tensor of the wrong shape;
    - the loss of a tensor- or context-parallel rank is scaled by this rank's own tokens, though each has another share of
      padding; here by all tokens of a micro batch, so every micro batch counts the same;
    - the loss over sequences divides each sequence by the mean number of tokens; here by its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        destroy_moe_metrics_tracker()  # of another model of this process, with its number of layers
        self._statistics: torch.Tensor | None = None

    def take_statistics(self) -> torch.Tensor | None:
        """Sums over the micro batches since the last call; None without any.

        Returns:
            float64 `[experts + 1]`: the tokens of each expert on this rank, and this rank's part of the balancing losses,
            without their coefficient. Without padding and imbalance, the parts of a micro batch sum to 1.
        """
        taken, self._statistics = self._statistics, None
        return taken

    def _add(self, index: slice | int, values: torch.Tensor) -> None:
        if self._statistics is None:
            self._statistics = torch.zeros(self.num_experts + 1, dtype=torch.float64, device=values.device)
        self._statistics[index] += values.detach()

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Also adds the loss to the statistics."""
        self._add(-1, aux_loss / aux_loss_coeff)
        kwargs["valid_token_count"] = None  # all tokens of this rank: see the class
        attached: torch.Tensor = super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )
        return attached

    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """With padding, scores are scaled so that Megatron-Core's division is by each sequence's own tokens, squared."""
        if with_padding_mask and self.get_aux_loss_coeff("seq_aux_loss"):
            tokens = routing_map.view(seq_length, bsz, -1).sum((0, 2)) / self.topk
            tokens = reduce_from_tensor_model_parallel_region(tokens, self.tp_cp_group)
            factors = (tokens.mean() / tokens.clamp(min=1)).square()
            scores_for_aux_loss = (scores_for_aux_loss.view(seq_length, bsz, -1) * factors[:, None]).flatten(0, 1)
        attached: torch.Tensor = super()._apply_seq_aux_loss(
            probs, scores_for_aux_loss, routing_map, seq_length, bsz, with_padding_mask
        )
        return attached

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Called by Megatron-Core after each choice: `routing_map` `[tokens, experts]`, `padding_mask` `[tokens]`."""
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        if self.training and torch.is_grad_enabled():  # not in validation, and once with recomputation
            self._add(slice(-1), routing_map.sum(0))
        super()._apply_expert_bias(routing_map)


class BiasedRouter(Router):
    """Megatron-Core's router with a bias (Megatron-Core: with `add_bias_linear` only)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.bias = torch.nn.Parameter(torch.empty_like(self.weight[:, 0]))
        if config.perform_initialization:
            torch.nn.init.normal_(self.bias, std=config.init_method_std)
        self.bias.sequence_parallel = config.sequence_parallel


class _GroupTopK:
    """Group-limited top-k with group score = sum of the `score_top` highest scores, through the router replay hook."""

    def __init__(self, score_top: int) -> None:
        self.score_top = score_top
        self.layer_number: int | None = None  # set by Megatron-Core

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int,
        group_topk: int,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[tokens, experts]` -> scores and indices of the top-k experts, `[tokens, topk]` each."""
        groups = scores.view(len(scores), num_groups, -1)
        best = groups.topk(self.score_top, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
        left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        return default_compute_topk(groups.masked_fill(left_out[..., None], -torch.inf).flatten(1), topk)


class GroupRouter(Router):
    """Megatron-Core's router with group score = sum of the top `score_top` scores (Megatron-Core: top_k / top_groups)."""

    def __init__(self, *args: Any, score_top: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = _GroupTopK(score_top)


def router_of(moe: MoE) -> Callable[..., Any]:
    """Class or builder of the router."""
    if moe.router_bias:
        return BiasedRouter
    if moe.groups == 1 or moe.top_k // moe.top_groups == moe.group_score_top:
        return Router
    return partial(GroupRouter, score_top=moe.group_score_top)
