import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from shared.errors import UserError
from shared.families import registry
from shared.mapping.key_form import KeyForm
from shared.model import weights
from shared.model.gpt import build
from shared.model.logits import logits
from shared.parallel import ParallelConfig
from shared.runtime.process_groups import initialize

ONE = ParallelConfig()


def blank(architecture, dtype=torch.float32):
    initialize(ONE, 1)
    return build(architecture, ONE, dtype=dtype)


def test_what_two_tensor_parallel_processes_saved_two_stages_load(two_processes):
    # Logits of size 1 of the very same weights; only the order of fp32 sums differs.
    assert two_processes["tp2 loaded at pp2"] < 1e-5


def test_one_process_loads_what_two_saved(two_processes, saved, worker):
    chunks = blank(worker.architecture())
    weights.load(chunks, saved / "trained")
    assert torch.isfinite(logits(chunks, worker.make_ids()[:, :8])).all()
    # Two processes pad the vocabulary to 512 rows, one to 384.
    metadata = dist_checkpointing.load_tensors_metadata(str(saved / "trained"))
    assert metadata["embedding.word_embeddings.weight"].global_shape == (512, 64)
    table = chunks[0].embedding.word_embeddings.weight
    assert table.shape == (384, 64)
    assert torch.count_nonzero(table[300:]) == 0


def test_names_on_disk_are_transformer_engines(saved):
    keys = load_sharded_metadata(str(saved / "weights"))
    names = {key.split("/")[0] for key in keys}
    assert names >= {
        "embedding.word_embeddings.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.self_attention.linear_qkv._extra_state",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.self_attention.q_layernorm._extra_state",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "decoder.final_layernorm._extra_state",
    }
    assert not any("input_layernorm" in name or "layer_norm__extra_state" in name for name in names)
    shapes = {k: v.global_shape for k, v in dist_checkpointing.load_tensors_metadata(str(saved / "weights")).items()}
    assert shapes["decoder.layers.mlp.linear_fc1.weight"] == (4, 2 * 96, 64)


def test_weights_are_cast_to_the_models_type(saved, worker):
    full, half = blank(worker.architecture()), blank(worker.architecture(), torch.bfloat16)
    weights.load(full, saved / "weights")
    weights.load(half, saved / "weights")
    for one, other in zip(full[0].parameters(), half[0].parameters(), strict=True):
        assert other.dtype == torch.bfloat16
        assert torch.equal(one.bfloat16(), other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": {"tied": False}}, "output_layer.weight is missing"),
        ({"attention": {"qk_norm": None}}, r"k_layernorm.weight and 1 more are unknown to the model"),
        (
            {"mlp": {"ffn_hidden_size": 80}},
            r"linear_fc1.weight is \[4, 192, 64\], hf/config.json requires \[4, 160, 64\]",
        ),
        ({"layers": 2}, r"is \[4, 64\], hf/config.json requires \[2, 64\]"),
        ({"vocab_size": 500}, r"word_embeddings.weight is \[384, 64\], hf/config.json requires \[512, 64\]"),
    ],
)
def test_weights_of_another_model_are_refused(changes, words, saved, worker):
    if "layers" in changes:
        changes = {"layers": worker.architecture().layers[: changes["layers"]]}
    chunks = blank(worker.architecture(**changes))
    with pytest.raises(UserError, match=words):
        weights.load(chunks, saved / "weights")
    assert all(torch.isnan(parameter).all() for parameter in chunks[0].parameters())


def test_padding_rows_come_out_zero_whatever_was_saved(saved, worker, tmp_path):
    chunks = blank(worker.architecture())
    weights.load(chunks, saved / "weights")
    with torch.no_grad():
        chunks[0].embedding.word_embeddings.weight[300:] = 7.0
    worker.save(chunks, tmp_path)
    again = blank(worker.architecture())
    weights.load(again, tmp_path)
    assert torch.count_nonzero(again[0].embedding.word_embeddings.weight[300:]) == 0


def test_optimizer_state_is_left_alone(saved, worker, tmp_path):
    chunks = blank(worker.architecture())
    weights.load(chunks, saved / "weights")
    state = weights.sharded_state_dict(chunks)["model"]
    from megatron.core.dist_checkpointing import ShardedTensor

    state["moment"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", torch.ones(3))
    worker.save(state, tmp_path)
    again = blank(worker.architecture())
    weights.load(again, tmp_path)
    for one, other in zip(chunks[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", [KeyForm(by_layer=True, by_expert=False), KeyForm(by_layer=True, by_expert=True)])
@pytest.mark.parametrize("size", ["tiny", "qwen3-moe-tiny"])
def test_layers_and_experts_under_keys_of_their_own_are_loaded(worker, tmp_path, size, form):
    """As Megatron-Core saves with `non_homogeneous_layers` or a list `moe_layer_freq`, and with `singleton_local_shards`."""
    architecture = registry.sizes()[size]
    initialize(ONE, 1)
    chunks = build(architecture, ONE, dtype=torch.float32, perform_initialization=True)
    weights._clear_padding(chunks[0])
    worker.save(chunks, tmp_path, form)
    keys = dist_checkpointing.load_tensors_metadata(str(tmp_path)).keys()
    fc1 = "mlp.experts.experts.{expert}linear_fc1.weight" if architecture.moe else "mlp.linear_fc1.weight"
    halves, expert = (("_w", "_v"), "0.") if form.by_expert else (("",), "")
    assert {f"decoder.layers.1.{fc1.format(expert=expert)}{half}" for half in halves} <= keys
    again = blank(architecture)
    weights.load(again, tmp_path)
    for one, other in zip(chunks[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", ["tiny", "qwen3-moe-tiny"])
def test_norms_under_their_other_key_are_loaded(worker, tmp_path, size):
    """As the local spec of Megatron-Core names them before experts, and as it names them with MLA."""
    architecture = registry.sizes()[size]
    initialize(ONE, 1)
    chunks = build(architecture, ONE, dtype=torch.float32, perform_initialization=True)
    weights._clear_padding(chunks[0])
    state = weights.sharded_state_dict(chunks)["model"]
    one, other = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    if architecture.moe:
        one, other = other, one
    renamed = [entry for entry in state.values() if one in entry.key and not entry.key.endswith("_extra_state")]
    assert renamed
    for entry in renamed:
        entry.key = entry.key.replace(one, other)
        entry.data.data.uniform_()
    worker.save(state, tmp_path)
    again = blank(architecture)
    weights.load(again, tmp_path)
    for one, other in zip(chunks[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)
