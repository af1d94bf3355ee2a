"""TransformerEngine's backend beside the local one: the same checkpoints, losses and gradients.

Without a GPU Megatron-Core's wrappers run on modules written out in plain torch
(`tests.references.transformer_engine_modules`), in one process for all models. The tests with the marker
`gpu` run on TransformerEngine itself.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from shared.architecture.architecture import MLP, LatentAttention, MoE
from shared.model.te_fp8 import obstacle
from tests.shared.kernels.fp8.examples import recipe
from tests.workers import results_of

_specification = importlib.util.spec_from_file_location("te_worker", Path(__file__).with_name("te_worker.py"))
worker = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(worker)
SIZES = worker.tiny_sizes()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `te_worker.py` found out."""
    return results_of(Path(__file__).with_name("te_worker.py"), tmp_path_factory.mktemp("te"))


@pytest.fixture
def compared(results, name):
    """The size's results."""
    found = results["sizes"][name]
    assert "error" not in found, found["error"]
    return found


def layers_of(architecture):
    """Every layer, those of MTP too."""
    mtp = architecture.mtp
    return [*architecture.layers, *([mtp.layer] * mtp.depth if mtp else [])]


@pytest.mark.parametrize("name", SIZES)
def test_checkpoints_have_the_same_tensors(compared, name):
    assert compared["tensors_differ"] == []
    assert compared["unfilled"] == []


@pytest.mark.parametrize("name", SIZES)
def test_extra_states_are_those_that_convert_writes(compared, name):
    """All but those of modules that are not TransformerEngine's here: core attention and norms; or that the model lacks."""
    assert compared["unknown_states"] == []
    assert compared["missing_states"] == []
    modules = {key.partition("._extra_state")[0].rpartition(".")[2] for key in compared["of_megatron_only"]}
    others = {"core_attention", "q_layernorm", "k_layernorm"}
    if SIZES[name].moe:
        others |= {"linear_fc1", "linear_fc2"} if not SIZES[name].moe.shared else set()
    assert modules <= others


@pytest.mark.parametrize("name", SIZES)
def test_losses_and_gradients_are_the_local_backends(compared, name):
    """fp32: the norms multiply in another order, 2^-24 each, adding up over two to four layers."""
    assert compared["loss_differs"] < 2e-5 * abs(compared["loss"])
    assert compared["gradients_differ"] < 2e-5


@pytest.mark.parametrize("name", SIZES)
def test_every_linear_layer_is_transformer_engines(compared, name):
    architecture = SIZES[name]
    layers = layers_of(architecture)
    assert compared["local_linears"] == 1  # the output layer
    assert compared["grouped"] == sum(isinstance(layer.mlp, MoE) for layer in layers)
    norm = architecture.layers[0].norm
    computed = norm.affine and (norm.kind == "rmsnorm" or norm.bias)
    assert computed == (not any(each.startswith("LayerNorm") for each in compared["left_out"]))
    fused = 0
    for layer in layers:
        alone = computed and layer.pre_norms and layer.residual.kind in ("sequential", "parallel")
        if isinstance(layer.mixer, LatentAttention):
            fused += 1 + (layer.mixer.q_lora_rank is not None)
        elif alone:
            fused += 1
        fused += alone and isinstance(layer.mlp, MLP)
    assert compared["with_norms"] == fused


def test_fallbacks_are_named(results):
    words = {each for found in results["sizes"].values() for each in found.get("left_out", [])}
    assert words == {
        "LayerNorm without bias",
        "LayerNorm without weights",
        "QK norm with weights per head",
        "QK norm over the whole projection",
    }


@pytest.mark.parametrize("name", worker.SAVED)
def test_a_directory_of_one_backend_is_read_by_the_other(results, name):
    """Every weight is equal to the bit."""
    assert results["both_ways"][name] == []


def test_a_released_directory_is_read_by_both(results):
    local, te = results["golden"]["contract-1"]
    assert te == pytest.approx(local, rel=1e-6)


@pytest.mark.parametrize("name", worker.RESUMED)
def test_a_run_goes_on_with_the_other_backend(results, name):
    """Loss and gradient norm of the third update. The optimizer's state is read by the same keys."""
    rows = results["resumed"][name]
    assert "error" not in rows, rows["error"]
    for one in ("te", "local"):
        assert rows[f"{one} to {one}"] == rows[one]  # to the last digit
        for other in ("te", "local"):
            assert rows[f"{one} to {other}"] == pytest.approx(rows[one], rel=1e-4)  # of sums of 1e4 numbers in fp32


@pytest.mark.parametrize(("name", "layout"), worker.LAYOUTS)
def test_layouts_train_as_the_local_backends(results, name, layout):
    """Losses and gradient norms of two updates on two processes: parts of weights, and marks by which gradients are joined."""
    local, te = (results["layouts"][f"{name} {layout} {backend}"] for backend in ("local", "te"))
    for one, other in zip(te, local, strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # of sums of 1e4 numbers in fp32


CLASSES = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


@pytest.mark.parametrize("name", worker.RECIPES)
def test_linear_layers_are_computed_with_the_recipes_object(results, name):
    """All but those of the layers that stay in bf16: the first one here. MTP layers and experts are in FP8."""
    found = results["fp8"][name]
    assert "error" not in found, found["error"]
    wanted = {"class": CLASSES[name], "format": recipe(name).format}
    if name == "delayed":
        wanted |= {"amax_history_len": 1024, "amax_compute_algo": "max"}
    in_bf16 = () if name == "delayed" else ("decoder.layers.0.",)
    assert any(place.startswith("mtp.layers.0.eh_proj") for place in found)
    assert any("experts.linear_fc2" in place for place in found)
    for place, used in found.items():
        assert used == (None if place.startswith(in_bf16) else wanted), place


def test_amax_histories_are_saved_and_resumed(results):
    found = results["fp8_states"][worker.FP8]
    assert "error" not in found, found["error"]
    assert found["restored"] == found["saved"]
    assert found["next"][0] == found["next"][1]
    assert len(found["saved"]) == results["sizes"][worker.FP8]["te_linears"]
    assert all(amax[0][:2] != [0, 0] and amax[1][:2] != [0, 0] and not any(amax[2]) for amax in found["saved"].values())


def test_histories_are_not_carried_to_the_other_backend_or_recipe(results):
    """And nothing breaks: the log says so."""
    found = results["fp8_states"][worker.FP8]
    assert found["by local"]
    assert not any(found["by local"])
    assert found["of local"] == found["by tensorwise"] == {}
    assert [line.split()[3:6] for line in found["said"]] == [["of", "TransformerEngine", "are"], ["of", "the", "local"]]


@pytest.fixture
def on_gpu():
    """One process on a GPU with TransformerEngine, and no model before."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("transformer_engine.pytorch", reason="needs transformer_engine")
    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize

    initialize(ParallelConfig(), 1)
    torch.manual_seed(1)


# Of a loss, and of the largest gradient. TransformerEngine multiplies fp32 matrices in TF32: 2^-11 each, adding up over layers;
# bf16 has 2^-9, and TransformerEngine's norms round once where the local ones round twice.
GPU_TOLERANCES = {"float32": 0.02, "bfloat16": 0.06}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_TOLERANCES)
@pytest.mark.parametrize("name", SIZES)
def test_transformer_engine_itself_computes_the_same(name, dtype, on_gpu):
    found = worker.compare(SIZES[name], dtype)
    assert found["tensors_differ"] == []
    assert found["unfilled"] == []
    assert found["missing_states"] == found["unknown_states"] == []
    assert found["loss_differs"] < GPU_TOLERANCES[dtype] * abs(found["loss"])
    assert found["gradients_differ"] < GPU_TOLERANCES[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("name", worker.SAVED)
def test_a_directory_of_transformer_engine_itself_is_read_by_the_other(name, on_gpu, tmp_path):
    assert worker.both_ways(SIZES[name], tmp_path) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", worker.RESUMED)
def test_a_run_goes_on_from_and_to_transformer_engine_itself(name, on_gpu, tmp_path):
    worker.both_ways(SIZES[name], tmp_path)
    rows = worker.resumed(SIZES[name], tmp_path)
    for one in ("te", "local"):
        for other in ("te", "local"):
            assert rows[f"{one} to {other}"] == pytest.approx(rows[one], rel=GPU_TOLERANCES["float32"])


@pytest.fixture
def in_fp8(request, on_gpu):
    """The recipe, where this GPU computes it."""
    used = recipe(request.param, amax_history=8)
    cuda = tuple(int(number) for number in torch.version.cuda.split(".")[:2])
    capability = torch.cuda.get_device_capability()
    if reason := obstacle(used, num_layers=2, pipeline=1, capability=capability, cuda=cuda):
        pytest.skip(reason)
    return used


# E4M3 has 2^-4 of relative error an element, E5M2 2^-3: they average out in sums of 256 products, and add up over layers.
FP8_LOSS, FP8_COSINE = 0.02, 0.97


@pytest.mark.gpu
@pytest.mark.parametrize("in_fp8", worker.RECIPES, indirect=True)
def test_fp8_of_transformer_engine_itself_is_near_bf16_and_the_local_backends(in_fp8):
    """Loss and direction of the gradient, after an update that fills amax histories."""
    for other in worker.compare_fp8(in_fp8).values():
        assert other["loss_differs"] < FP8_LOSS
        assert other["cosine"] > FP8_COSINE


@pytest.mark.gpu
@pytest.mark.parametrize("in_fp8", worker.RECIPES, indirect=True)
def test_a_run_in_fp8_resumes_on_transformer_engine_itself_to_the_last_digit(in_fp8, tmp_path):
    continued, again = worker.resumed_fp8(in_fp8, tmp_path)
    assert again == continued
