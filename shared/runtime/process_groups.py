"""How a model is spread over processes, and the process groups that follow from it."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.runtime.device import backend, prepare


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Numbers of processes a model replica is cut over; what remains of the world is data parallel."""

    tensor: int = 1
    """Processes that share every layer's matrices (Megatron's TP)."""
    pipeline: int = 1
    """Processes that hold consecutive groups of layers (PP)."""
    virtual_pipeline: int = 1
    """Groups of layers on each pipeline process; above 1 the schedule is interleaved."""
    context: int = 1
    """Processes that share a sequence (CP)."""
    expert: int = 1
    """Processes that share a layer's experts (EP)."""
    sequence_parallel: bool = False
    """Whether norms and residuals are cut along the sequence over the tensor-parallel processes."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    def check(self, architecture: Architecture, world_size: int) -> None:
        """Raises `UserError`, naming the flag, where the layout fits neither the model nor the processes."""
        self._check_own()
        if world_size % self.model_parallel_size:
            raise UserError(
                f"--processes {world_size} is not a multiple of --tensor-parallel {self.tensor} x "
                f"--pipeline-parallel {self.pipeline} x --context-parallel {self.context}"
            )
        heads, groups = architecture.num_attention_heads, architecture.num_query_groups
        if heads % self.tensor:
            raise UserError(f"--tensor-parallel {self.tensor} does not divide the model's {heads} attention heads")
        # With fewer key/value heads than processes Megatron-Core cuts inside a head and gathers the pieces.
        if groups % self.tensor and self.tensor % groups:
            raise UserError(
                f"--tensor-parallel {self.tensor} neither divides nor is a multiple of the model's {groups} "
                "key/value heads"
            )
        if architecture.ffn_hidden_size % self.tensor:
            raise UserError(
                f"--tensor-parallel {self.tensor} does not divide the model's feed-forward size "
                f"{architecture.ffn_hidden_size}"
            )
        self._check_latent(architecture)
        self._check_delta(architecture)
        self._check_experts(architecture, world_size)
        stages = self.pipeline * self.virtual_pipeline
        if architecture.num_layers % stages:
            flags = f"--pipeline-parallel {self.pipeline}"
            if self.virtual_pipeline > 1:
                flags += f" x --virtual-pipeline {self.virtual_pipeline}"
            raise UserError(f"{flags} does not divide the model's {architecture.num_layers} layers")

    def _check_latent(self, architecture: Architecture) -> None:
        latent = architecture.latent
        if latent is None or self.tensor == 1:
            return
        if not self.sequence_parallel:
            raise UserError("latent attention with --tensor-parallel above 1 needs --sequence-parallel")
        for size in (latent.q_lora_rank or 0, latent.kv_lora_rank + latent.qk_rope_head_dim):
            if size % self.tensor:
                raise UserError(
                    f"--tensor-parallel {self.tensor} does not divide latent attention's low-rank projection of {size}"
                )

    def _check_delta(self, architecture: Architecture) -> None:
        delta = architecture.delta
        if delta is None or self.tensor == 1:
            return
        if not self.sequence_parallel:
            raise UserError("gated delta nets with --tensor-parallel above 1 need --sequence-parallel")
        if delta.key_heads % self.tensor:
            raise UserError(
                f"--tensor-parallel {self.tensor} does not divide the gated delta nets' {delta.key_heads} heads of keys"
            )

    def _check_experts(self, architecture: Architecture, world_size: int) -> None:
        experts = architecture.experts
        if experts is None:
            if self.expert != 1:
                raise UserError(f"--expert-parallel {self.expert}: this model has no experts; only 1 is possible")
            return
        if experts.count % self.expert:
            raise UserError(f"--expert-parallel {self.expert} does not divide the model's {experts.count} experts")
        if world_size % (self.tensor * self.pipeline * self.expert):
            raise UserError(
                f"--processes {world_size} is not a multiple of --tensor-parallel {self.tensor} x "
                f"--pipeline-parallel {self.pipeline} x --expert-parallel {self.expert}"
            )
        if self.tensor > 1 and not self.sequence_parallel:
            raise UserError("experts with --tensor-parallel above 1 need --sequence-parallel")
        if experts.ffn_hidden_size % self.tensor:
            raise UserError(
                f"--tensor-parallel {self.tensor} does not divide the experts' size {experts.ffn_hidden_size}"
            )

    def _check_own(self) -> None:
        for flag, value in (
            ("--tensor-parallel", self.tensor),
            ("--pipeline-parallel", self.pipeline),
            ("--virtual-pipeline", self.virtual_pipeline),
            ("--expert-parallel", self.expert),
        ):
            if value < 1:
                raise UserError(f"{flag} must be at least 1, not {value}")
        if self.context != 1:
            raise UserError(f"--context-parallel {self.context}: only 1 is supported; use --tensor-parallel instead")
        if self.sequence_parallel and self.tensor == 1:
            raise UserError("--sequence-parallel needs --tensor-parallel above 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise UserError("--virtual-pipeline above 1 needs --pipeline-parallel above 1")


def initialize(layout: ParallelLayout, seed: int) -> torch.device:
    """Process groups and random generators for `layout`; returns this process's device.

    Joins the world that `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` describe, or makes a world of one
    when `RANK` is absent. Called again it replaces the model-parallel groups. Raises `UserError` when the layout does
    not fit the world.
    """
    layout._check_own()
    device = prepare()
    _forget_groups()
    if not torch.distributed.is_initialized():
        if "RANK" in os.environ:
            torch.distributed.init_process_group(backend())
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend(), store=store, rank=0, world_size=1)
    world_size = torch.distributed.get_world_size()
    if world_size % layout.model_parallel_size:
        raise UserError(
            f"{world_size} processes cannot hold a model cut over {layout.model_parallel_size} "
            f"(--tensor-parallel {layout.tensor} x --pipeline-parallel {layout.pipeline})"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
    )
    # Pipeline stages draw different numbers, data-parallel replicas the same: Megatron-LM's rule.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
    return device


def _forget_groups() -> None:
    """Take down what an earlier call made; a world of several processes stays, since all of them would have to meet."""
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    if torch.distributed.get_world_size() == 1:  # gloo's threads poll: those of dozens of old groups fill a core
        torch.distributed.destroy_process_group()


def leave() -> None:
    """Leave a world of several processes together, when the work is done.

    A process that ends amid its groups' threads may abort. A world of one stays, for whoever initialises it anew.
    """
    if torch.distributed.get_world_size() == 1:
        return
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def data_parallel_size() -> int:
    """Replicas of the model in the world."""
    return parallel_state.get_data_parallel_world_size()
