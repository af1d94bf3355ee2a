"""Frozen weights are bitwise unchanged; gradients of the others equal those of full training."""

from dataclasses import asdict, replace
from fnmatch import fnmatchcase

import pytest
import torch
from megatron.core import dist_checkpointing

from shared.errors import UserError
from shared.families import registry
from shared.model import gpt
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training.loop import model_overrides, trainable_of
from shared.training.trainable import FULL, Frozen

PATTERNS = {
    "some": ["embedding.*", "decoder.layers.1.*", "decoder.layers.2.*_proj.weight"],
    "stage": ["embedding.*", "decoder.layers.[01].*"],  # the first of two stages
}
LAYOUTS = {
    "data": {},
    "tensor_and_sequence": {"tensor": 2, "sequence_parallel": True},
    "pipeline": {"pipeline": 2},
}
CASES = [*(("some", name) for name in LAYOUTS), ("stage", "pipeline")]


@pytest.fixture(scope="module")
def runs(run_cases, tiny_run, start):
    """The directory and the results of a model of four layers with tied embeddings, trained whole and in part."""
    config, architecture = tiny_run
    case = {
        "processes": 2,
        "updates": 5,
        "config": asdict(replace(config, clip_grad=0.0)),
        "architecture": architecture.to_dict(),
        "start": str(start),
        "one_process": None,
    }
    cases = {f"full-{name}": {**case, "layout": LAYOUTS[name], "frozen": None, "updates": 1} for name in LAYOUTS}
    for kind, name in CASES:
        cases[f"{kind}-{name}"] = {**case, "layout": LAYOUTS[name], "frozen": PATTERNS[kind]}
    cases["stage-pipeline"]["config"] = case["config"] | {"recompute": "full"}
    return run_cases(cases)


def tensors(directory) -> dict[str, torch.Tensor]:
    """Those of a checkpoint, with a tensor for each layer."""
    found = {}
    for key, value in dist_checkpointing.load_plain_tensors(str(directory)).items():
        before, layers, name = key.partition("decoder.layers.")
        if layers and not name[0].isdigit():
            found |= {f"{before}decoder.layers.{index}.{name}": layer for index, layer in enumerate(value)}
        elif isinstance(value, torch.Tensor):
            found[key] = value
    return found


def is_frozen(name: str, kind: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS[kind])


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_gradients_of_the_others_are_those_of_the_whole_model(runs, kind, layout):
    """After one update Adam's first moment is a tenth of the gradient."""
    directory, _ = runs
    prefix = "optimizer.state.exp_avg."
    ours, theirs = (
        {name.removeprefix(prefix): value for name, value in tensors(path / "1").items() if name.startswith(prefix)}
        for path in (directory / f"{kind}-{layout}", directory / f"full-{layout}")
    )
    trained = {name for name in theirs if not is_frozen(name, kind)}
    assert ours.keys() == trained
    assert len(trained) < len(theirs)
    for name in trained:
        assert torch.equal(ours[name], theirs[name]), name
        assert theirs[name].any(), name


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_frozen_weights_stay_and_the_others_do_not(runs, start, kind, layout):
    directory, _ = runs
    before, after = tensors(start), tensors(directory / f"{kind}-{layout}" / "3")
    assert before.keys() <= after.keys()  # the checkpoint is a whole model
    for name in before:
        rows = 300 if name.startswith("embedding.") else None  # the vocabulary, without padding
        assert torch.equal(before[name][:rows], after[name][:rows]) == is_frozen(name, kind), name


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_resume_continues_bit_for_bit(runs, kind, layout):
    results = runs[1][f"{kind}-{layout}"]
    assert results["resumed"] == results["continued"]
    assert results["continued"][-1][0] < results["first"][0][0]


def test_losses_do_not_depend_on_the_layout(runs):
    for part in ("first", "continued"):
        losses = {name: [loss for loss, *_ in runs[1][f"some-{name}"][part]] for name in LAYOUTS}
        for layout in LAYOUTS:
            assert losses[layout] == pytest.approx(losses["data"], rel=5e-6)  # fp32 sums in another order


def test_a_frozen_stage_has_no_parameter_in_its_optimizer(runs):
    first, last = runs[1]["stage-pipeline"]["ranks"]
    assert (first["parameters"], first["steps"]) == ([0], [[]])
    assert last["parameters"][0] > 5
    assert last["steps"] == [[5.0]]


def test_a_frozen_router_keeps_its_correction_bias(sessions, tiny_run, make_weights, tmp_path):
    """Megatron-Core moves it after each update, without a gradient."""
    architecture = registry.sizes()["deepseek-v3-tiny"]
    start = make_weights(tmp_path / "start", architecture)
    frozen = Frozen(("decoder.layers.1.mlp.router.weight",))
    session = sessions.Session(tiny_run[0], architecture, start, restore=False, trainable=frozen)
    session.train(0, 2)
    model = session.model[0].module
    assert not model.decoder.layers[1].mlp.router.expert_bias.any()
    assert model.mtp.layers[0].mtp_model_layer.mlp.router.expert_bias.any()


def build(architecture, config):
    """The model chunk of one process."""
    process_groups.initialize(ParallelConfig(), 1)
    return gpt.build(
        architecture, ParallelConfig(), dtype=torch.float32, perform_initialization=True, **model_overrides(config)
    )


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (("decoder.layers.9.*", "embedding.*"), "no parameter of the model matches decoder.layers.9.*;"),
        (("*",), "no parameter is left to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything(architecture, make_config, patterns, text):
    with pytest.raises(UserError) as refused:
        Frozen(patterns).apply(build(architecture, make_config()))
    assert text in str(refused.value)


def test_the_experts_of_a_layer_have_one_name(make_config):
    """They are one tensor in a checkpoint, and which of them a rank has depends on the layout."""
    chunks = build(registry.sizes()["qwen3-moe-tiny"], make_config())
    with pytest.raises(UserError, match=r"no parameter of the model matches .*local_experts"):
        Frozen(("decoder.layers.0.mlp.experts.local_experts.1.*",)).apply(chunks)
    Frozen(("decoder.layers.0.mlp.experts.*",)).apply(chunks)
    frozen = {name for name, parameter in chunks[0].named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in chunks[0].named_parameters() if name.startswith("decoder.layers.0.mlp.experts.")
    }
    assert frozen


def test_mtp_layers_without_a_loss_are_frozen(make_config, architecture, mtp_run):
    assert trainable_of(make_config(mtp_loss_scaling_factor=0.0), mtp_run[1]) == Frozen(("mtp.*",))
    assert trainable_of(make_config(mtp_loss_scaling_factor=0.1), mtp_run[1]) is FULL
    assert trainable_of(make_config(mtp_loss_scaling_factor=0.0), architecture) is FULL
