"""The options of `pretrain train` and `sft train`, with their defaults. Standard library and pydantic only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from shared.cli import ExistingDir, NonNegative, Positive, Seed
from shared.foreign_formats import absent, indexed_prefix, not_a_directory
from shared.kernels.attention.names import AttentionBackend
from shared.kernels.fp8.recipes import Fp8Format, RecipeName
from shared.model.backend_choice import BackendName
from shared.model.recompute import Recompute
from shared.parallel import ContextExchange
from shared.precision import RunPrecision
from shared.rehearsal.machine import GpuName
from shared.report.track import DEFAULT, Track
from shared.runtime.progress import HANG_SECONDS


def _existing_data(path: Path) -> Path:
    if path.is_dir():
        return path
    prefix = indexed_prefix(path)
    if prefix is None:
        raise ValueError(not_a_directory(path) if path.exists() else absent(path))
    return prefix


# Published datasets, or prefixes of Megatron pairs.
Data = Annotated[tuple[Annotated[Path, AfterValidator(_existing_data)], ...], Field(min_length=1)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]

# Options of memory, speed and logging: not part of the run's fingerprint.
NOT_FINGERPRINTED = (
    *("micro_batch_size", "tensor_parallel", "pipeline_parallel", "virtual_pipeline", "pipeline_layers"),
    *("sequence_parallel", "expert_parallel", "expert_tensor_parallel", "context_parallel"),
    *(
        "context_parallel_exchange",
        "backend",
        "attention_backend",
        "processes",
        "recompute",
        "overlap",
        "offload_optimizer",
    ),
    *("save_every", "keep", "keep_best", "async_save", "hang_timeout", "log_every", "track", "extend"),
    *("rehearse", "gpu", "gpu_memory", "world", "gpus_per_node", "all_ranks"),
)

# Options that the first version did not have: at their defaults its runs are resumed.
ADDED = (
    *("iteration", "data_weights", "fp8_recipe", "fp8_format", "fp8_amax_history", "fp8_bf16_layers"),
    *("lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "rslora", "lora_weight_decay", "adapter"),
    "early_stop",
)

# Options that `extend` may change: from the resumed update on they are those of the command.
EXTENDABLE = (
    *("steps", "epochs", "global_batch_size", "learning_rate", "min_learning_rate", "schedule", "warmup_steps"),
    *("decay_steps", "weight_decay", "lora_weight_decay", "clip_grad", "adam_beta1", "adam_beta2"),
    *("validate_every", "validation_sequences", "early_stop", "moe_router_bias_update_rate"),
    *("precision", "fp8_recipe", "fp8_format", "fp8_amax_history", "fp8_bf16_layers"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options as given; None: `stage.plan` chooses.

    Attributes:
        source: the Megatron checkpoint to start from.
        data: datasets of the tool's `prepare`, separated by commas.
        data_weights: shares of the datasets in the training sequences, in the order of --data: 0.7,0.3. By default every
            dataset is read equally often.
        target: the run directory.
        steps: updates; by default one epoch of the data, of several until the first is used up.
        global_batch_size: sequences per update.
        micro_batch_size: sequences per forward pass of one process; by default as many as make about 8192 tokens.
        learning_rate: peak learning rate.
        min_learning_rate: final learning rate of cosine and wsd; by default a tenth of the peak.
        schedule: cosine, wsd (warmup-stable-decay, 1 - sqrt) or constant, each after a linear warm-up.
        warmup_steps: updates of the warm-up; by default one in a hundred, at most 2000.
        decay_steps: updates of the decay phase of wsd; by default a fifth.
        weight_decay: decoupled, on matrices; norms and biases have none. LoRA has its own, --lora-weight-decay.
        mtp_loss_scaling_factor: weight of the MTP (multi-token prediction) loss, for models with MTP layers; by default
            0.1. 0 freezes these layers.
        moe_router_bias_update_rate: what an update adds to the correction bias of an expert with fewer tokens than the mean,
            and takes from the others; for MoE models with that bias, by default 0.001. 0 keeps the bias.
        clip_grad: global gradient norm to clip at; 0 for no clipping.
        adam_beta1: AdamW's beta1, decay of the mean of gradients.
        adam_beta2: AdamW's beta2, decay of the mean of squared gradients.
        seed: of the order of the data.
        precision: bf16 with fp32 main weights; the same with linear layers in FP8 (fp8); or fp32.
        fp8_recipe: how FP8 numbers are scaled: tensorwise (by each tensor's own amax, the default), delayed (by the amax of
            earlier updates), rowwise, blockwise (as DeepSeek-V3), mxfp8.
        fp8_format: hybrid has gradients in E5M2 and the rest in E4M3, e4m3 all in E4M3; by default e4m3 for blockwise
            and mxfp8, hybrid for the others.
        fp8_amax_history: updates whose highest amax the delayed recipe scales by; by default 1024.
        fp8_bf16_layers: how many first and last layers stay in bf16, as 1,1; by default 1,1.
        recompute: activation recomputation: of whole layers (full), of core attention (selective), or of modules, separated by
            commas: core_attn, mlp, moe, shared_experts, mla_up_proj.
        backend: linear layers and norms of TransformerEngine (te) or of Megatron-Core and Baton (local); by default te on GPUs
            where transformer_engine can be imported.
        attention_backend: kernel of attention, docs/attention.md; by default the first that carries what the model needs.
        tensor_parallel: tensor parallel size.
        pipeline_parallel: pipeline parallel size.
        virtual_pipeline: model chunks per pipeline rank; above 1 the schedule is interleaved.
        pipeline_layers: decoder layers of each model chunk, in the order of the model: 5,8,8,7 with 4 stages; pipeline x
            virtual pipeline numbers. By default equal shares. The output layer and MTP layers are in the last chunk.
        sequence_parallel: split norms and residuals along the sequence over the tensor-parallel ranks.
        context_parallel: context parallel size: so many ranks share each sequence.
        context_parallel_exchange: how these ranks attend to each other's tokens: gather all keys and values, or exchange
            heads, for models whose query and key/value heads --tensor-parallel x --context-parallel divides.
        expert_parallel: expert parallel size, for MoE: the experts of a layer are spread over so many data-parallel ranks.
        expert_tensor_parallel: tensor parallel size of experts; by default --tensor-parallel. 1 keeps every expert whole.
        overlap: reduce gradients during the backward pass and gather weights during the next forward pass, with several
            data-parallel ranks.
        offload_optimizer: keep AdamW's moments in host memory between updates, 8 bytes a parameter; the numbers stay the same, to
            the bit, and an update takes as long as moving 16 bytes a parameter through the GPU's link.
        processes: world size; by default one process per GPU, without GPUs as many as the layout needs. Data parallel
            size is processes / (tensor x pipeline x context).
        save_every: updates between checkpoints; the last update is always saved.
        keep: newest checkpoints kept in the target.
        async_save: write checkpoints while training goes on. Takes the memory of a second copy of the state on the host.
        log_every: updates between log lines; metrics.jsonl has every update.
        track: where the numbers of metrics.jsonl go, too: tensorboard, wandb, mlflow, trackio, separated by commas, or none. All
            write to the target unless their own environment variables name a server.
        validate_every: updates between validations, 0 for only the first and the last; by default a tenth of the steps.
        validation_sequences: sequences per validation, at most; the same in every validation.
        keep_best: save the iteration with the lowest validation loss at its validation, and keep it beside the newest.
        early_stop: end the run after so many validations without a lower loss.
        hang_timeout: seconds without progress after which a rank hangs and the job is ended; an update may take ten times the
            median of the last ones, the first 10 minutes, opening, loading and saving 30 minutes. 0: no watch.
        overwrite: replace another run's result at the target.
        extend: resume a run at the target, finished or not, with other updates, batch size, rates or validation.
        lora_rank: train LoRA adapters of this rank, and no weight of the model; the run directory holds adapters only.
        lora_alpha: scale of the adapters' product times rank; by default twice the rank.
        lora_targets: matrices with an adapter, by their Hugging Face names or ends of them: q_proj,v_proj; all-linear:
            attention and MLP, experts included.
        lora_dropout: dropout of the adapters' input.
        rslora: rank-stabilised LoRA: the scale is alpha / sqrt(rank) instead of alpha / rank.
        lora_weight_decay: decoupled, of the adapters' A and B; by default 0, as in PEFT's trainings.
        adapter: go on with a LoRA adapter of PEFT (adapter_config.json, adapter_model.safetensors), which says rank, alpha and
            targets; in place of --lora-rank.
        iteration: a kept iteration of the source, a run directory; by default the newest.
        rehearse: play the run's ranks without GPUs, say what memory each needs and whether they match, and write nothing.
        gpu: the kind of GPU that --rehearse plays; by default h100-80.
        gpu_memory: its memory, as 80GiB, in place of that kind's.
        world: how many GPUs --rehearse plays; by default --processes.
        gpus_per_node: GPUs of a node in the launch map of --rehearse; by default 8.
        all_ranks: rehearse every rank, not only the first of each pipeline stage.
    """

    source: ExistingDir
    data: Data
    target: Path
    steps: Positive | None = None
    global_batch_size: Positive = 64
    micro_batch_size: Positive | None = None
    learning_rate: Rate = 3e-4
    min_learning_rate: Rate | None = None
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative | None = None
    decay_steps: NonNegative | None = None
    weight_decay: Rate = 0.1
    mtp_loss_scaling_factor: Rate | None = None
    moe_router_bias_update_rate: Rate | None = None
    clip_grad: Rate = 1.0
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.95
    seed: Seed = 0
    precision: RunPrecision = "bf16"
    fp8_recipe: RecipeName | None = None
    fp8_format: Fp8Format | None = None
    fp8_amax_history: Positive | None = None
    fp8_bf16_layers: tuple[NonNegative, NonNegative] | None = None
    recompute: tuple[Recompute, ...] = ("none",)
    backend: BackendName | None = None
    attention_backend: AttentionBackend | None = None
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    virtual_pipeline: Positive = 1
    pipeline_layers: tuple[Positive, ...] | None = None
    sequence_parallel: bool = False
    context_parallel: Positive = 1
    context_parallel_exchange: ContextExchange = "gather"
    expert_parallel: Positive = 1
    expert_tensor_parallel: Positive | None = None
    overlap: bool = True
    offload_optimizer: bool = False
    processes: Positive | None = None
    save_every: Positive = 500
    keep: Positive = 2
    async_save: bool = False
    log_every: Positive = 10
    track: tuple[Track, ...] = DEFAULT
    validate_every: NonNegative | None = None
    validation_sequences: Positive = 1024
    keep_best: bool = False
    early_stop: Positive | None = None
    hang_timeout: NonNegative = HANG_SECONDS
    overwrite: bool = False
    extend: bool = False
    iteration: NonNegative | None = None
    data_weights: tuple[Weight, ...] | None = None
    lora_rank: Positive | None = None
    lora_alpha: Weight | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: Decay | None = None
    rslora: bool = False
    lora_weight_decay: Rate | None = None
    adapter: ExistingDir | None = None
    rehearse: bool = False
    gpu: GpuName | None = None
    gpu_memory: str | None = None
    world: Positive | None = None
    gpus_per_node: Positive | None = None
    all_ranks: bool = False
