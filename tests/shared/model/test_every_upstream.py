"""Internals of Megatron-Core that shared/model relies on: docs/upstream.md."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import torch
from megatron.core import fp8_utils, recompute
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.safe_globals import SafeUnpickler
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MultiLatentAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock, MultiTokenPredictionLayer
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from shared.model.context_parallel import chunks_of_rank
from shared.model.gated_delta_net import TorchGatedDeltaNet
from shared.model.gpt import uneven_layers
from shared.model.mla import _RESOLVED, LatentSelfAttention
from shared.model.rope import PrefixRotaryAngles
from shared.model.router import _GroupTopK
from shared.model.transformer_layer import GeneralTransformerLayer
from shared.runtime.device import select_device
from tests.upstream import attributes_read, attributes_set, binds, calls, parameters, relies_on

ATTENTION = "shared/model/attention.py"
CONTEXT = "shared/model/context_parallel.py"
DELTA_NET = "shared/model/gated_delta_net.py"
EMBEDDING = "shared/model/embedding_and_head.py"
GPT = "shared/model/gpt.py"
LAYER = "shared/model/transformer_layer.py"
LORA = "shared/model/lora.py"
MLA = "shared/model/mla.py"
MOE = "shared/model/moe.py"
MLP_FILE = "shared/model/dense_mlp.py"
MTP = "shared/model/mtp.py"
EXPERTS = "shared/model/experts.py"
FP8 = "shared/model/fp8_linear.py"
ROUTER = "shared/model/router.py"
TE = "shared/model/te_backend.py"
TE_FP8 = "shared/model/te_fp8.py"


def test_parallel_linears_have_their_product_in_a_method() -> None:
    given = {"input": "input_parallel", "bias": "bias", "allreduce_dgrad": "allreduce_dgrad"}
    parallel = "False if self.explicit_expert_comm else self.sequence_parallel"
    calls(FP8, ColumnParallelLinear.forward, "self._forward_impl", weight="weight", sequence_parallel=parallel, **given)
    given |= {"bias": "None", "weight": "self.weight", "sequence_parallel": "False"}
    calls(FP8, RowParallelLinear.forward, "self._forward_impl", **given)
    relies_on(FP8, RowParallelLinear.forward, "allreduce_dgrad = False")
    for linear in (ColumnParallelLinear, RowParallelLinear):
        assert "tp_group" in attributes_set(linear.__init__), FP8
        relies_on(FP8, linear.sharded_state_dict, "state_dict = self.state_dict(prefix='', keep_vars=True)")
        assert parameters(linear.set_extra_state) == {"state"}, FP8


def test_attention_takes_queries_and_keys_from_a_method() -> None:
    calls(ATTENTION, Attention.forward, "self.get_query_key_value_tensors", "hidden_states", "key_value_states")
    rotated = "rotary_pos_emb is not None"
    relies_on(
        ATTENTION, Attention.forward, "query, key, value = qkv_output", "query, key, value, gate = qkv_output", rotated
    )


def test_the_attention_mask_reaches_the_attention_product() -> None:
    product = ("apply_module(self.core_attention)", "query", "key", "value", "attention_mask")
    calls(ATTENTION, Attention.forward, *product, attn_mask_type="attn_mask_type")
    calls(ATTENTION, Attention._run_core_attention, *product, attn_mask_type="attn_mask_type")
    mask = {"attention_mask": "attention_mask"}
    calls(ATTENTION, GPTModel.forward, "self.decoder", **mask)
    calls(ATTENTION, TransformerBlock.forward, "layer", **mask)
    calls(ATTENTION, recompute.checkpointed_forward, "dict", **mask)
    calls(ATTENTION, TransformerLayer._forward_attention, "self.self_attention", "input_layernorm_output", **mask)


def test_rotary_angles_are_made_of_inverse_frequencies() -> None:
    rope = RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
    rope.inv_freq = torch.tensor([1.0, 0.5, 0.25, 0.125])
    assert not rope.state_dict()
    assert rope.get_freqs_non_repeated(3)[2].tolist() == [2.0, 1.0, 0.5, 0.25]
    calls("shared/model/rope.py", RotaryEmbedding.get_emb, "self.get_freqs_non_repeated", "max_seq_len", "offset")


def test_gpt_calls_its_rotary_embedding() -> None:
    assert "rotary_pos_emb" in attributes_set(GPTModel.__init__), GPT
    calls(GPT, GPTModel._preprocess, "self.rotary_pos_emb", "rotary_seq_len")
    calls(GPT, GPTModel._preprocess, "self.rotary_pos_emb", "position_ids", "self.mrope_section")
    assert parameters(PrefixRotaryAngles.forward) == {"position_ids", "section", "cp_group"}


def test_gpt_ends_in_a_method_called_by_keyword() -> None:
    read = ("input_ids", "position_ids", "hidden_states", "attention_mask", "rotary_pos_emb", "labels")
    calls(GPT, GPTModel.forward, "self._postprocess", **{name: name for name in read})
    relies_on(
        GPT,
        GPTModel._postprocess,
        "output_weight = self.shared_embedding_or_output_weight()",
        "logits.transpose(0, 1).contiguous()",
        "self.compute_language_model_loss(labels, logits)",
    )


def test_mtp_states_are_one_tensor() -> None:
    wanted = ("input_ids", "position_ids", "hidden_states", "attention_mask", "rotary_pos_emb", "embedding")
    binds(GPT, MultiTokenPredictionBlock.forward, None, **dict.fromkeys(wanted))
    relies_on(
        GPT,
        MultiTokenPredictionBlock.forward,
        "hidden_states_list.append(hidden_states)",
        "hidden_states = torch.cat(hidden_states_list, dim=0)",
    )


def test_embeddings_are_set_up_by_a_method_that_marks_weights() -> None:
    calls(GPT, GPTModel.__init__, "self.setup_embeddings_and_output_layer")
    relies_on(
        GPT,
        LanguageModule.setup_embeddings_and_output_layer,
        "self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True",
        "self.output_layer.weight.is_embedding_or_output_parameter = True",
        "self.shared_embedding_or_output_weight().shared_embedding = True",
    )


def test_an_embedding_is_made_of_these_modules() -> None:
    read = {"config", "vocab_size", "tp_group", "reduce_scatter_embeddings"}
    replaced = {"word_embeddings", "position_embeddings", "embedding_dropout"}
    assert read | replaced <= attributes_set(LanguageModelEmbedding.__init__), EMBEDDING
    relies_on(
        EMBEDDING,
        LanguageModelEmbedding.forward,
        "word_embeddings = self.word_embeddings(input_ids)",
        "position_embeddings = self.position_embeddings(position_ids)",
        "embeddings = word_embeddings + position_embeddings",
        "embeddings = embeddings.transpose(0, 1).contiguous()",
        "embeddings = self.embedding_dropout(embeddings)",
    )


def test_the_output_layer_is_called_with_a_weight() -> None:
    assert {"parallel_output", "vocab_size"} <= attributes_set(GPTModel.__init__), EMBEDDING
    calls(EMBEDDING, GPTModel._postprocess, "self.output_layer", "hidden_states", weight="output_weight")
    as_ours = {"bias": "False", "skip_bias_add": "False", "gather_output": "not self.parallel_output"}
    calls(EMBEDDING, GPTModel.__init__, "output_layer_cls", "config.hidden_size", "self.vocab_size", **as_ours)
    binds(EMBEDDING, ColumnParallelLinear.forward, None, None, weight=None)
    relies_on(EMBEDDING, ColumnParallelLinear.forward, "weight is None")


def test_gradients_are_summed_by_mark_and_by_name() -> None:
    relies_on(
        "shared/model/norm.py",
        _allreduce_non_tensor_model_parallel_grads,
        "config.sequence_parallel and getattr(param, 'sequence_parallel', False)",
        "config.qk_layernorm and ('q_layernorm' in name or 'k_layernorm' in name)",
    )


def test_uneven_stages_are_kept_by_rank() -> None:
    kinds = [["embedding", "decoder"], ["decoder"] * 2, ["decoder"] * 3, ["decoder", "loss"]]
    kept = PipelineParallelLayerLayout(kinds, 2)
    assert [[each.count(LayerType.decoder) for each in rank] for rank in kept.layout] == [[1, 3], [2, 1]], GPT
    assert uneven_layers(SimpleNamespace(pipeline_model_parallel_layout=kept)) == [1, 2, 3, 1]
    relies_on(
        GPT,
        TransformerConfig.__post_init__,
        "self.pipeline_model_parallel_layout = PipelineParallelLayerLayout("
        "layout=self.pipeline_model_parallel_layout, "
        "pipeline_model_parallel_size=self.pipeline_model_parallel_size)",
    )


def test_mla_finds_its_norms_in_a_method() -> None:
    calls(MLA, MLASelfAttention.__init__, "self._resolve_qk_norm_config", "submodules")
    assert parameters(LatentSelfAttention._resolve_qk_norm_config) == {"submodules"}
    relies_on(MLA, MLASelfAttention.__init__, *(f"layer_classes['{name}']" for name in _RESOLVED))


def test_mla_takes_queries_and_keys_from_a_method() -> None:
    given = ("hidden_states", "key_value_states", "position_ids", "packed_seq_params")
    keywords = {"inference_context": "inference_context"}
    calls(MLA, MLASelfAttention.forward, "self.get_query_key_value_tensors", *given, **keywords)
    assert parameters(LatentSelfAttention.get_query_key_value_tensors) == {*given, *keywords}
    relies_on(
        MLA,
        MLASelfAttention.forward,
        "query, key, value, q_compressed, kv_compressed",
        "self.qkv_up_checkpoint.discard_output_and_register_recompute(core_attn_out)",
    )
    assert {"rotary_pos_emb", "recompute_up_proj", "qkv_up_checkpoint"} <= attributes_set(MultiLatentAttention.__init__)


def test_mla_builds_down_projections_of_classes_it_knows() -> None:
    for name, size in (
        ("linear_q_down_proj", "self.config.q_lora_rank"),
        ("linear_kv_down_proj", "self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim"),
    ):
        relies_on(
            MLA,
            MLASelfAttention.__init__,
            f"submodules.{name} in [Linear, TEColumnParallelLinear, ColumnParallelLinear]",
            f"raise ValueError(f'Unsupported {name}: {{submodules.{name}}}')",
        )
        common = {
            "bias": "False",
            "skip_bias_add": "False",
            "is_expert": "False",
            "init_method": "self.config.init_method",
        }
        calls(
            MLA,
            MLASelfAttention.__init__,
            "build_module",
            f"submodules.{name}",
            "self.config.hidden_size",
            size,
            **common,
        )


def test_a_router_adds_its_bias() -> None:
    relies_on(ROUTER, Router.__init__, "self.bias = None")
    calls(ROUTER, Router.gating, "router_gating_linear", "input", "self.weight", "self.bias")


def test_a_router_asks_its_replay_for_the_choice() -> None:
    relies_on(
        ROUTER,
        moe_utils.topk_routing_with_score_function,
        "router_replay.get_replay_topk(scores, topk, num_groups, group_topk, _compute_topk)",
    )
    calls(ROUTER, TopKRouter.routing, "topk_routing_with_score_function", "logits", router_replay="self.router_replay")
    relies_on(ROUTER, TopKRouter.__init__, "self.router_replay = None")
    relies_on(ROUTER, Router.set_layer_number, "self.router_replay.layer_number = layer_number")
    binds(ROUTER, _GroupTopK(1).get_replay_topk, None, 1, 1, 1, None)


def test_a_router_counts_in_these_methods() -> None:
    routing, mask = TopKRouter.routing, {"padding_mask": "padding_mask"}
    calls(ROUTER, routing, "self._apply_expert_bias", "routing_map", **mask)
    relies_on(ROUTER, TopKRouter._apply_expert_bias, "routing_map = routing_map & ~padding_mask")
    given = ("probs", "scores_for_aux_loss", "routing_map_for_aux_loss")
    masked = {"with_padding_mask": "padding_mask is not None"}
    calls(ROUTER, routing, "self._apply_seq_aux_loss", *given, "seq_length", "bsz", **masked)
    relies_on(ROUTER, moe_utils.get_tokens_per_expert_and_token_count, "global_tokens_per_expert.sum() / topk")
    attach = "self.attach_and_log_load_balancing_loss"
    tokens = ("local_num_tokens", "local_num_tokens * bsz")
    for method, count in zip((TopKRouter._apply_aux_loss, TopKRouter._apply_seq_aux_loss), tokens, strict=True):
        calls(ROUTER, method, attach, "probs", valid_token_count=count)
    relies_on(
        ROUTER,
        TopKRouter.attach_and_log_load_balancing_loss,
        "valid_token_count if valid_token_count is not None else activation.shape[0]",
    )


def test_the_padding_mask_reaches_the_router() -> None:
    mask = {"padding_mask": "padding_mask"}
    made = "(decoder_input, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin, sequence_len_offset, padding_mask)"
    calls(GPT, GPTModel.forward, "self._preprocess", **mask)
    calls(GPT, GPTModel.forward, "self.decoder", **mask)
    relies_on(GPT, GPTModel._preprocess, f"preproc_output = {made}")
    relies_on(GPT, GPTModel.forward, f"{made} = preproc_output[:6]")
    calls(GPT, MultiTokenPredictionBlock.forward, "self.layers[layer_idx]", **mask)
    calls(MTP, MultiTokenPredictionLayer.forward, "self._get_embeddings", **mask)
    relies_on(
        MTP,
        MultiTokenPredictionLayer._get_embeddings,
        "return (input_ids, position_ids, padding_mask, decoder_input, hidden_states)",
    )
    calls(LAYER, MoELayer.route, "apply_module(self.router)", "hidden_states", "padding_mask")
    relies_on(LAYER, MoELayer.forward, "padding_mask = padding_mask.transpose(0, 1).bool()")


def test_experts_are_a_loop_over_mlps() -> None:
    calls(EXPERTS, SequentialMLP.forward, "expert", "tokens", "probs")
    assert {"local_experts", "num_local_experts", "tp_group"} <= attributes_set(SequentialMLP.__init__), EXPERTS


def test_an_mlp_is_two_linear_layers_and_an_activation() -> None:
    relies_on(
        MLP_FILE,
        MLP.forward,
        "intermediate_parallel, bias_parallel = apply_module(self.linear_fc1)(hidden_states)",
        "intermediate_parallel = intermediate_parallel + bias_parallel",
        "x_glu, x_linear = torch.chunk(x, 2, dim=-1)",
        "x_glu = x_glu.clamp(min=None, max=val)",
        "x_linear = x_linear.clamp(min=-val, max=val)",
        "self.config.activation_func(x_glu) * (x_linear + self.config.glu_linear_offset)",
        "intermediate_parallel = self.activation_func(intermediate_parallel)",
        "intermediate_parallel = intermediate_parallel * per_token_scale.unsqueeze(-1)",
        "return output, output_bias",
    )
    passed = {"padding_mask": "padding_mask"}
    calls(MLP_FILE, TransformerLayer, "apply_module(self.mlp)", "pre_mlp_layernorm_output", **passed)


def test_wrappers_of_transformer_engine_read_their_norm_from_the_configuration() -> None:
    relies_on(
        TE,
        extensions.TENorm,
        "config.normalization == 'LayerNorm'",
        "config.normalization == 'RMSNorm'",
        "use_fused_residual = config.fused_residual_rmsnorm and has_residual",
    )
    calls(TE, extensions.TENorm, "norm_module", zero_centered_gamma="config.layernorm_zero_centered_gamma", eps="eps")
    relies_on(TE, extensions, "extra_kwargs['normalization'] = self.config.normalization")
    of_linear = {
        "eps": "self.config.layernorm_epsilon",
        "zero_centered_gamma": "self.config.layernorm_zero_centered_gamma",
        "return_layernorm_output": "False",
    }
    calls(TE, extensions, "super().__init__", **of_linear)


def test_biases_of_all_experts_are_a_list_that_is_added_out_of_place() -> None:
    calls(MOE, TEGroupedMLP.__init__, "submodules.linear_fc2", "self.num_local_experts", skip_bias_add="True")
    calls(MOE, TEGroupedMLP.__init__, "submodules.linear_fc1", "self.num_local_experts", skip_bias_add="False")
    relies_on(
        MOE,
        TEGroupedMLP.forward,
        "output = self._apply_bias(output, output_bias, tokens_per_expert, permuted_probs)",
        "return (output, output_bias)",
    )


def test_fp8_contexts_are_entered_layer_by_layer() -> None:
    calls(TE_FP8, TransformerBlock.forward, "get_fp8_context", "self.config", "layer.layer_number - 1")
    calls(TE_FP8, MultiTokenPredictionLayer._proj_and_transformer_layer, "get_fp8_context", "self.config")
    relies_on(
        TE_FP8,
        fp8_utils,
        "not (config.first_last_layers_bf16 and isinstance(fp8_recipe, TEDelayedScaling))",
        "fp8_recipe = transformer_engine.common.recipe.Float8BlockScaling(fp8_format=fp8_format)",
        "fp8_context = transformer_engine.pytorch.fp8_autocast(enabled=True, fp8_recipe=fp8_recipe, fp8_group=fp8_group)",
    )
    relies_on(TE_FP8, extensions, "config.fp8_amax_history_len", "config.fp8_amax_compute_algo")
    states = {
        ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
        ("torch._utils", "_rebuild_tensor_v2"),
    }
    assert states <= SafeUnpickler._SAFE_CLASSES, TE_FP8


def test_a_buffer_is_filled_from_the_last_parameter() -> None:
    calls(EXPERTS, DistributedOptimizer._compute_per_buffer_param_layout, "pad_param_start", "param_start_index")
    source = inspect.getsource(DistributedOptimizer._compute_per_buffer_param_layout)
    assert "for param in params[::-1]:" in source, EXPERTS


def test_an_expert_adds_its_bias_in_place() -> None:
    relies_on(
        MOE,
        MLP.forward,
        "output, output_bias = apply_module(self.linear_fc2)(cast(torch.Tensor, intermediate_parallel))",
        "output += output_bias.unsqueeze(0) * per_token_scale.unsqueeze(-1)",
    )


def test_a_delta_net_finds_the_attributes_that_it_reads() -> None:
    used = (GatedDeltaNet._setup_variant_attrs, GatedDeltaNet.reset_parameters, GatedDeltaNet.sharded_state_dict)
    inherited = set(dir(GatedDeltaNet)) | {"config"}
    made = attributes_set(TorchGatedDeltaNet.__init__, GatedDeltaNet._setup_variant_attrs)
    lacking = attributes_read(*used) - inherited - made
    assert not lacking, f"{sorted(lacking)}: set them in {DELTA_NET}, which skips GatedDeltaNet.__init__"
    assert {"in_proj_extra_dim", "feat_dim_split"} <= attributes_set(GatedDeltaNet._setup_variant_attrs)
    assert {"in_proj", "conv1d", "dt_bias", "A_log", "out_norm", "out_proj"} <= attributes_set(
        GatedDeltaNet.__mro__[1].__init__
    )


def test_layers_are_called_by_keyword() -> None:
    own = parameters(GeneralTransformerLayer.forward) - {"others"}
    passed = {name: name for name in own}
    calls(LAYER, TransformerBlock.forward, "layer", **passed)
    calls(LAYER, recompute.checkpointed_forward, "dict", **passed)
    relies_on(LAYER, recompute.checkpointed_forward, "hidden_states, context = layer(**layer_kwargs)")
    calls(LAYER, MultiTokenPredictionLayer._proj_and_transformer_layer, "self.mtp_model_layer", **passed)
    relies_on(
        LAYER,
        TransformerLayer.forward,
        "hidden_states, context = self._forward_attention(*args, **kwargs)",
        "return (output, context)",
    )
    parts = {"input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp", "hidden_dropout"}
    assert parts <= attributes_set(TransformerLayer.__init__), LAYER


def test_linear_layers_compute_and_describe_themselves_in_methods() -> None:
    for linear in (ColumnParallelLinear, RowParallelLinear):
        relies_on(LORA, linear.forward, "return (output, output_bias)")
        relies_on(LORA, linear.sharded_state_dict, "state_dict = self.state_dict(prefix='', keep_vars=True)")
        assert {"tp_group", "sequence_parallel", "is_expert"} <= attributes_set(linear.__init__), LORA


def test_parts_of_a_weight_are_split_by_its_name() -> None:
    split = "apply_swiglu_sharded_factory(v, sharded_offsets, singleton_local_shards, "
    split += "tp_group=self.tp_group, dp_group=metadata['dp_cp_group'])"
    relies_on(LORA, MLP.sharded_state_dict, f"sub_sd[k] = {split}")
    entry = "sharded_state_dict[f'{prefix}in_proj.weight']"
    parts = "list(self.in_proj_split_sections), self.in_proj_split_names, 0"
    relies_on(LORA, GatedDeltaNet.sharded_state_dict, f"{entry} = _split_tensor_factory({entry}, {parts})")
    binds(LORA, _split_tensor_factory, "tensor", [1], ["part"], 0)


class _Group:
    """A context-parallel group as far as its rank and size."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def _received(given: dict[int, torch.Tensor], tensor: torch.Tensor, src: int) -> Mock:
    tensor.copy_(given[src])
    return Mock()


def test_rope_and_mtp_cut_a_sequence_as_we_do(monkeypatch) -> None:
    select_device()
    size, chunks = 3, torch.arange(24).chunk(6)
    for rank in range(size):
        first, last = chunks_of_rank(rank, size)
        mine = torch.cat((chunks[first], chunks[last]))
        assert torch.equal(get_pos_emb_on_this_cp_rank(torch.arange(24), 0, _Group(rank, size)), mine), CONTEXT
        neighbours = {
            (rank + 1) % size: chunks[first + 1][0],  # the next rank's first chunk follows this one's
            (rank - 1) % size: chunks[(last + 1) % 6][0],  # the previous rank's last chunk follows this one's
        }
        monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: list(range(size)))
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "isend", lambda tensor, dst: Mock())
        monkeypatch.setattr(torch.distributed, "irecv", partial(_received, neighbours))
        expected = torch.where(mine + 1 < 24, mine + 1, 0)
        assert torch.equal(multi_token_prediction.roll_tensor(mine, cp_group=_Group(rank, size))[0], expected), CONTEXT
