"""The configuration of a training run, checked before heavy imports and allocations."""

from __future__ import annotations

from dataclasses import dataclass

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families import registry
from shared.kernels.attention.names import AttentionBackend
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.mapping.adapters import LoraSettings, adapted_linears
from shared.model.backend_choice import BackendName
from shared.model.recompute import Recompute, check_recompute
from shared.parallel import ParallelConfig
from shared.precision import TrainingPrecision
from shared.training.schedule import Schedule, ScheduleName

MTP_LOSS_SCALING_FACTOR = 0.1  # Megatron-Core's default
MOE_ROUTER_BIAS_UPDATE_RATE = 1e-3  # Megatron-Core's default, DeepSeek V3's for most of its training
_MICRO_BATCH_TOKENS = 8192  # per forward pass: enough to keep a GPU busy, with moderate activations


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run."""

    steps: int  # updates
    sequence_length: int  # tokens
    micro_batch_size: int  # sequences per forward pass of one data-parallel rank
    global_batch_size: int  # sequences per update
    learning_rate: float  # at the peak
    min_learning_rate: float
    schedule: ScheduleName
    warmup_steps: int
    decay_steps: int  # wsd only
    weight_decay: float  # decoupled, on matrices only
    mtp_loss_scaling_factor: float  # weight of the MTP loss; 0: MTP layers are frozen
    moe_router_bias_update_rate: float  # step of the correction bias after an update
    clip_grad: float  # global gradient norm; 0: no clipping
    adam_beta1: float
    adam_beta2: float
    seed: int
    precision: TrainingPrecision  # of weights and activations
    fp8: Fp8Recipe | None  # of linear layers; None: in the precision of the weights
    recompute: tuple[Recompute, ...]  # activation recomputation: modules, or whole layers (full)
    backend: BackendName | None  # None: te where it can be used
    attention_backend: AttentionBackend | None  # None: the first that carries what a layer needs
    parallel: ParallelConfig
    save_every: int  # updates
    keep: int  # newest iterations kept in the run directory
    async_save: bool  # forked processes write a save while training goes on
    log_every: int  # updates between log lines; metrics.jsonl has every update
    validate_every: int  # updates; 0: only before the first and after the last
    validation_sequences: int  # at most; the same in every validation
    overlap: bool  # reduce gradients and gather weights during computation, where there are data-parallel ranks
    offload_optimizer: bool = False  # AdamW's moments are in host memory between updates
    lora: LoraSettings | None = None  # adapters are trained instead of weights
    keep_best: bool = False  # the iteration with the lowest validation loss is saved, and kept
    early_stop: int | None = None  # validations without a lower loss after which the run ends

    @property
    def micro_batches(self) -> int:
        """Micro batches per update and data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.parallel.data)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro batch between the linear layers of one rank."""
        sequence = self.sequence_length // self.parallel.context
        if self.parallel.sequence_parallel:
            sequence //= self.parallel.tensor
        return sequence * self.micro_batch_size

    def learning_rates(self) -> Schedule:
        return Schedule(
            name=self.schedule,
            peak=self.learning_rate,
            minimum=self.min_learning_rate,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
        )

    def __post_init__(self) -> None:
        """Check the rules without a model. UserError names the flag to change."""
        self.parallel.check_batch(
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
        )
        if self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"--min-learning-rate {self.min_learning_rate} is above --learning-rate {self.learning_rate}"
            )
        decay = self.decay_steps if self.schedule == "wsd" else 0
        if decay > self.steps:  # the rate would begin below its peak, without a word
            raise UserError(f"--decay-steps {decay} is longer than the run of --steps {self.steps}")
        # cosine divides by `steps - warmup_steps`: warm-up must end before the last step.
        available = self.steps - decay - (self.schedule == "cosine" and self.steps > 1)
        if self.warmup_steps > max(available, 0):
            raise UserError(
                f"--warmup-steps {self.warmup_steps} does not fit into --steps {self.steps}"
                + (f" before the last --decay-steps {decay}" if decay else "")
            )

    def check_model(self, architecture: Architecture) -> None:
        """Check the run against its model. UserError names the flag to change."""
        self.parallel.check_model(architecture)
        check_recompute(self.recompute, architecture)
        layers = range(architecture.num_layers)
        if self.fp8 and not any(self.fp8.in_fp8(layer, architecture.num_layers) for layer in layers):
            first, last = self.fp8.bf16_layers
            raise UserError(
                f"--fp8-bf16-layers {first},{last} leaves none of {architecture.num_layers} layers in FP8; give "
                "--fp8-bf16-layers 0,0, or --precision bf16"
            )
        if self.lora is not None:
            adapted_linears(registry.table_of(architecture), self.lora.targets, expert_tensor=self.parallel.etp)
        if self.sequence_length > architecture.max_position_embeddings:
            raise UserError(
                f"sequences of {self.sequence_length} tokens are longer than the model's max_position_embeddings "
                f"{architecture.max_position_embeddings}; give --sequence-length "
                f"{architecture.max_position_embeddings} or less"
            )


def default_micro_batch_size(global_batch_size: int, data_parallel: int, sequence_length: int) -> int:
    """The largest divisor of `global_batch_size / data_parallel` with at most 8192 tokens per micro batch."""
    share = max(global_batch_size // max(data_parallel, 1), 1)
    fitting = [
        size for size in range(1, share + 1) if share % size == 0 and size * sequence_length <= _MICRO_BATCH_TOKENS
    ]
    return max(fitting, default=1)


def default_warmup_steps(steps: int) -> int:
    """`steps / 100`, at most 2000."""
    return min(steps // 100, 2000)


def default_decay_steps(steps: int) -> int:
    """`steps / 5`, as in arXiv:2405.18392."""
    return steps // 5
