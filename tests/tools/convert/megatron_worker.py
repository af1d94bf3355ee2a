"""One of two ranks that load converted checkpoints in plain Megatron-Core, without a GPU.

Run as `megatron_worker.py WORK RANK PORT`. For each model in WORK, at TP=2, then at PP=2: Megatron-Core's GPTModel with its local
layer spec loads WORK/<model>.megatron/release by `dist_checkpointing.load`, computes logits, decodes greedily, and saves by
`dist_checkpointing.save` like a training run. MoE models are loaded, also at EP=2, and saved in every form of keys
and with the local spec's name of the norm before experts.
"""

from __future__ import annotations

import os
import queue
import sys
from pathlib import Path
from typing import Any

import torch

import shared.runtime.device

shared.runtime.device.select_device()  # CUDA, or its surface on the CPU, before Megatron-Core is imported

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from shared.checkpoint.directory.auxiliary_files import read_config  # noqa: E402
from shared.families import registry  # noqa: E402
from shared.model.logits import logits  # noqa: E402

CONTINUED = 32  # tokens
PRE_MLP_NORM = "pre_mlp_layernorm."
# Metadata of `sharded_state_dict`: how layers and experts are named.
FORMS: dict[str, dict[str, bool]] = {
    "layer": {"non_homogeneous_layers": True},
    "expert": {"singleton_local_shards": True},
}


def build(architecture: Any, tensor: int, pipeline: int, expert: int = 1) -> GPTModel:
    moe = architecture.moe
    experts: dict[str, Any] = {}
    if moe:
        experts = {
            "num_moe_experts": moe.experts,
            "moe_ffn_hidden_size": moe.expert.ffn_hidden_size,
            "moe_router_topk": moe.top_k,
            "expert_model_parallel_size": expert,
        }
    config = TransformerConfig(
        **experts,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.feed_forward.ffn_hidden_size,
        num_attention_heads=architecture.attention.heads,
        num_query_groups=architecture.attention.groups,
        kv_channels=architecture.attention.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.layers[0].norm.epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.attention.bias,
        qk_layernorm=architecture.attention.qk_norm is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=moe.experts if moe else None,
        qk_layernorm=architecture.attention.qk_norm is not None,
        normalization="RMSNorm",
    )
    if moe:  # as the spec of TransformerEngine, which people train MoE with, has it
        del spec.submodules.sharded_state_dict_keys_map[PRE_MLP_NORM]
    model = GPTModel(
        config,
        spec,
        vocab_size=architecture.padded_vocab_size(tensor),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=architecture.head.tied,
        position_embedding_type="rope",
        rotary_base=architecture.attention.rotary.theta,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.architecture = architecture  # what shared.model.logits asks of a model
    return model


def load(source: Path, tensor: int, pipeline: int, expert: int) -> GPTModel:
    architecture = registry.from_config(read_config(source / "hf" / "config.json"))
    model = build(architecture, tensor, pipeline, expert)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(source / "release"))
    model.load_state_dict(loaded["model"], strict=False)
    return model


def save(model: GPTModel, target: Path, metadata: dict[str, Any]) -> None:
    saved = target / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        saved.mkdir(parents=True)
        (target / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    replicas = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = model.sharded_state_dict(metadata=metadata | replicas)
    state = {"model": state, "checkpoint_version": 3.0, "iteration": 7}
    dist_checkpointing.save(state, str(saved))


def main(work: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    filesystem_async._results_queue = queue.Queue()  # no manager process that outlives this one
    filesystem_async._process_memory = lambda: 0  # asks for psutil, for a debugging line
    first = torch.distributed.get_rank() == 0
    for layout, tensor, pipeline, expert in (("tp2", 2, 1, 1), ("pp2", 1, 2, 1), ("ep2", 1, 1, 2)):
        parallel_state.initialize_model_parallel(tensor, pipeline, expert_model_parallel_size=expert)
        model_parallel_cuda_manual_seed(0)
        for source in sorted(work.glob("*.megatron")):
            name = source.name.removesuffix(".megatron")
            model = load(source, tensor, pipeline, expert)
            if model.architecture.moe:
                names = {PRE_MLP_NORM: "mlp.linear_fc1.layer_norm_"}  # what `build` took out of the local spec
                for layer in model.decoder.layers:
                    layer.submodules_config.sharded_state_dict_keys_map.update(names)
                save(model, work / f"{name}.{layout}.local", {})
                for layer in model.decoder.layers:
                    layer.submodules_config.sharded_state_dict_keys_map.pop(PRE_MLP_NORM, None)
                for form, metadata in FORMS.items():
                    save(model, work / f"{name}.{layout}.{form}", metadata)
                model.config.moe_layer_freq = [1] * model.architecture.num_layers
                save(model, work / f"{name}.{layout}.list", {})
                continue
            if layout == "ep2":
                continue
            ids = torch.load(work / f"{name}.ids.pt")
            result = {"logits": logits([model], ids)}
            while ids.shape[1] < result["logits"].shape[1] + CONTINUED:
                following = logits([model], ids)[:, -1:].argmax(-1)
                ids = torch.cat([ids, following], dim=1)
            result["continued"] = ids[:, -CONTINUED:]
            if first:
                torch.save(result, work / f"{name}.{layout}.pt")
            save(model, work / f"{name}.{layout}", {})
            if layout == "tp2":
                save(model, work / f"{name}.{layout}.expert", FORMS["expert"])
        parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(RANK=sys.argv[2], LOCAL_RANK=sys.argv[2], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = sys.argv[3]
    main(Path(sys.argv[1]))
