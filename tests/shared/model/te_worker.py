"""Models of every family with TransformerEngine's modules, written out in plain torch, beside the local backend's.

Run as `python te_worker.py DIRECTORY`: writes `DIRECTORY/results.json`, and checkpoints beside it.
"""

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from tests.references import transformer_engine_modules as written_out  # noqa: E402
from tests.workers import forked_world  # noqa: E402

# Saved by one backend and loaded by the other.
SAVED = ("qwen3-tiny", "bloom-tiny", "gpt-oss-tiny", "deepseek-v3-tiny", "qwen3-next-tiny")
# Other norms, residuals, biases and MoE than the first size of their family.
FURTHER = (
    *("internlm2-tiny-bias", "qwen3-moe-tiny-mixed", "qwen3-next-tiny-mixed", "moonlight-tiny", "cohere-tiny-qk-norm"),
    *("stablelm-tiny-parallel", "stablelm-tiny-qk-norm", "falcon-tiny-rw", "opt-350m-tiny", "galactica-tiny"),
    "mpt-tiny-clipped",
)
RESUMED = ("qwen3-tiny", "deepseek-v3-tiny")
LAYOUTS = {
    ("gpt-oss-tiny", "tensor"): {"tensor": 2, "sequence_parallel": True},  # with biases
    ("deepseek-v3-tiny", "tensor"): {"tensor": 2, "sequence_parallel": True},
    ("deepseek-v3-tiny", "expert"): {"expert": 2},
}
FP8 = "deepseek-v3-tiny"  # MLA, MoE with shared experts, MTP
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "contract-1" / "megatron"


def tiny_sizes():
    """A tiny size of every family that can be trained, and `FURTHER`."""
    from shared.families import registry
    from shared.model.support import unsupported

    tiny = {name: size for name, size in registry.sizes().items() if "tiny" in name and not unsupported(size)}
    of_family = {size.family: name for name, size in reversed(tiny.items())}
    return {name: size for name, size in tiny.items() if name in {*of_family.values(), *FURTHER}}


def model_of(architecture, backend, *, initialised, dtype="float32"):
    import torch

    from shared.model.gpt import build
    from shared.parallel import ParallelConfig

    model = build(
        architecture, ParallelConfig(), dtype=getattr(torch, dtype), perform_initialization=initialised, backend=backend
    )[0].eval()
    if initialised:
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases differ from one and zero
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pieces(model):
    """What a checkpoint has of the model: tensors by key and offset, and the names of extra states."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    from shared.model.weights import sharded_state_dict

    tensors, objects = {}, set()

    def add(entry):
        if isinstance(entry, ShardedTensorFactory):
            add(entry.build())
        elif isinstance(entry, ShardedTensor):
            tensors[entry.key, tuple(entry.global_offset)] = (tuple(entry.global_shape), entry.data.detach())
        elif isinstance(entry, ShardedObject):
            objects.add(entry.unique_key)
        else:
            for each in entry.values() if isinstance(entry, dict) else entry:
                add(each)

    add(sharded_state_dict([model]))
    return tensors, objects


def inputs(architecture, length=24):
    import torch

    from shared.model.prefix_lm import with_blank
    from shared.runtime.device import select_device

    depth = architecture.mtp.depth if architecture.mtp else 0
    ids = torch.randint(architecture.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    ids = with_blank(ids, architecture)
    labels = torch.stack([ids] * (1 + depth)) if depth else ids
    given = {"input_ids": ids, "position_ids": torch.arange(length)[None], "labels": labels}
    return {name: tensor.to(select_device()) for name, tensor in given.items()} | {"attention_mask": None}


def losses_and_gradients(model, architecture, length=24):
    """Losses of every token, and the gradient of their sum in a checkpoint's pieces."""
    import torch

    losses = model(**inputs(architecture, length))
    losses.sum().backward()
    kept = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = {place: data.clone() for place, (_, data) in pieces(model)[0].items()}
    for parameter, data in zip(model.parameters(), kept, strict=True):
        parameter.data = data
    return losses.detach(), gradients


def compare(architecture, dtype="float32"):
    """The model by both backends, with the same weights."""
    import torch

    from shared.mapping.extra_states import extra_states
    from shared.model.backend import LOCAL
    from shared.model.te_backend import TEBackend, left_out

    local = model_of(architecture, LOCAL, initialised=True, dtype=dtype)
    te = model_of(architecture, TEBackend(), initialised=False, dtype=dtype)
    (ours, own_states), (theirs, states) = pieces(local), pieces(te)
    with torch.no_grad():
        for place in ours.keys() & theirs.keys():
            theirs[place][1].copy_(ours[place][1])
    unfilled = [name for name, parameter in te.named_parameters() if parameter.isnan().any()]
    (expected, slopes), (found, own) = (losses_and_gradients(each, architecture) for each in (local, te))
    largest = max(float(slope.abs().max()) for slope in slopes.values())
    modules = [type(each).__name__ for each in te.modules()]
    return {
        "tensors_differ": sorted(
            str(place)
            for place in ours.keys() | theirs.keys()
            if (ours.get(place) or [0])[0] != (theirs.get(place) or [0])[0]
        ),
        "unfilled": unfilled,
        "unknown_states": sorted(states - set(extra_states(architecture))),
        "missing_states": sorted(own_states - states),
        "of_megatron_only": sorted(set(extra_states(architecture)) - states),
        "left_out": left_out(architecture),
        "local_linears": sum(name in ("ColumnParallelLinear", "RowParallelLinear") for name in modules),
        "with_norms": modules.count("LayerNormColumnParallelLinear"),
        "grouped": modules.count("TEGroupedMLP"),
        "te_linears": sum(hasattr(each, "fp8_meta") for each in te.modules()),
        "loss": float(expected.mean()),
        "loss_differs": float((found - expected).abs().max()),
        "gradients_differ": max(float((own[place] - slope).abs().max()) for place, slope in slopes.items()) / largest,
    }


def both_ways(architecture, directory):
    """A checkpoint by each backend, loaded by the other: pieces that differ from those saved."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from shared.model import weights
    from shared.model.backend import LOCAL
    from shared.model.te_backend import TEBackend
    from shared.training.state import write_from_threads

    filesystem_async._process_memory = lambda: 0  # asks psutil for a debugging line
    write_from_threads()
    differing = []
    for name, writes, reads in (("te", TEBackend(), LOCAL), ("local", LOCAL, TEBackend())):
        source = model_of(architecture, writes, initialised=True)
        weights._clear_padding(source)
        (directory / name).mkdir(parents=True)
        dist_checkpointing.save(weights.sharded_state_dict([source])["model"], str(directory / name))
        target = model_of(architecture, reads, initialised=False)
        weights.load([target], directory / name)
        saved, loaded = pieces(source)[0], pieces(target)[0]
        differing += [f"{name}: {place}" for place in saved if not torch.equal(saved[place][1], loaded[place][1])]
        strict = {key: value for key, value in target.state_dict().items() if key.endswith("_extra_state")}
        target.load_state_dict(dict.fromkeys(strict), strict=False)  # None, as `convert` writes them
    return differing


def golden():
    """The released version's directory, loaded by each backend: losses, which `weights.load` would refuse to make up."""
    from shared.families import registry
    from shared.model import weights
    from shared.model.backend import LOCAL
    from shared.model.te_backend import TEBackend

    architecture = registry.from_files(GOLDEN / "hf")
    losses = []
    for backend in (LOCAL, TEBackend()):
        model = model_of(architecture, backend, initialised=False)
        weights.load([model], GOLDEN / "release")
        losses.append(model(**inputs(architecture)).mean().item())
    return losses


def in_fp8(architecture, name, **changes):
    """The recipe that each of TransformerEngine's linear layers computed with, by name of the module; None: not in FP8."""
    from shared.model.te_backend import TEBackend
    from tests.shared.kernels.fp8.examples import recipe

    model = model_of(architecture, TEBackend(fp8=recipe(name, **changes)), initialised=True)
    model(**inputs(architecture)).sum().backward()
    found = {}
    for place, module in model.named_modules():
        if hasattr(module, "fp8_meta"):
            used = module.fp8_meta["recipe"]
            fields = ("amax_history_len", "amax_compute_algo")
            found[place] = used and {
                "class": type(used).__mro__[-3].__name__,  # before the base of all recipes
                "format": used.fp8_format.name.lower(),
                **{field: getattr(used, field) for field in fields if hasattr(used, field)},
            }
    return found


def histories(session):
    """Of delayed scaling: amax of the activations and weights of each linear layer, newest first; by name."""
    return {
        name: module.fp8_meta["scaling_fwd"].amax_history[-3:].flip(0).tolist()
        for name, module in session.model[0].module.named_modules()
        if "scaling_fwd" in getattr(module, "fp8_meta", {})
    }


def fp8_states(architecture, directory):
    """`taken_up`, and what was said about states."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = taken_up(architecture, directory)
    return found | {"said": [line for line in said.getvalue().splitlines() if "amax histories" in line]}


def taken_up(architecture, directory):
    """Two updates by delayed scaling, saved, and taken up again in every way."""
    from dataclasses import replace

    from shared.model.backend import LOCAL
    from shared.model.fp8_backend import Fp8Backend
    from shared.model.te_backend import TEBackend
    from shared.training.fp8_update import linears_of
    from tests.shared.kernels.fp8.examples import recipe
    from tests.shared.training.conftest import tiny_config
    from tests.shared.training.layouts_worker import Session

    delayed = recipe("delayed", amax_history=8)
    config = replace(tiny_config(sequence_length=24, micro_batch_size=4, global_batch_size=4), fp8=delayed)
    te, local = TEBackend(fp8=delayed), Fp8Backend(LOCAL, delayed, architecture.num_layers)
    first = Session(config, architecture, directory / "te", restore=False, backend=te)
    first.train(0, 2)
    first.save(directory / "fp8", step=2)
    again = Session(config, architecture, directory / "fp8", backend=te)
    found = {"saved": histories(first), "restored": histories(again), "next": [first.train(2, 3), again.train(2, 3)]}
    theirs = Session(config, architecture, directory / "fp8", backend=local)
    found["by local"] = [each.fp8_state.tensors["weights"].history.values for _, each in linears_of(theirs.model)]
    theirs.train(2, 3)
    theirs.save(directory / "fp8-local", step=3)
    found["of local"] = histories(Session(config, architecture, directory / "fp8-local", backend=te))
    current = replace(config, fp8=recipe("tensorwise"))
    found["by tensorwise"] = histories(
        Session(current, architecture, directory / "fp8", backend=TEBackend(fp8=current.fp8))
    )
    return found


def larger():
    """A model whose matrices fit every recipe."""
    from shared.families import registry

    sizes = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    return registry.from_config({"model_type": "llama", "tie_word_embeddings": True, **sizes, **heads})


def compare_fp8(recipe):
    """Loss and gradients of TransformerEngine in FP8, beside those in bf16 and of the local backend if it has the recipe."""
    import torch

    from shared.model.backend import LOCAL
    from shared.model.fp8_backend import Fp8Backend
    from shared.model.te_backend import TEBackend

    architecture = larger()
    local = model_of(architecture, LOCAL, initialised=True, dtype="bfloat16")
    weights = {place: data.clone() for place, (_, data) in pieces(local)[0].items()}

    def measured(backend):
        model = model_of(architecture, backend, initialised=False, dtype="bfloat16")
        with torch.no_grad():
            for place, (_, data) in pieces(model)[0].items():
                data.copy_(weights[place])
        losses_and_gradients(model, architecture, length=64)  # its amax is in the histories
        model.zero_grad()
        losses, slopes = losses_and_gradients(model, architecture, length=64)
        return losses.mean().item(), torch.cat([slopes[place].flatten().float() for place in sorted(slopes)])

    loss, gradient = measured(TEBackend(fp8=recipe))
    others = {"bf16": measured(LOCAL)}
    if recipe.obstacle("cuda", torch.cuda.get_device_capability()) is None:
        others["local"] = measured(Fp8Backend(LOCAL, recipe, architecture.num_layers))
    return {
        name: {
            "loss_differs": abs(loss - other) / other,
            "cosine": torch.nn.functional.cosine_similarity(gradient, slopes, dim=0).item(),
        }
        for name, (other, slopes) in others.items()
    }


def resumed_fp8(recipe, directory):
    """Updates three and four, of a run that goes on and of one that was saved and resumed."""
    from dataclasses import replace

    from shared.model.te_backend import TEBackend
    from tests.shared.training.conftest import tiny_config
    from tests.shared.training.layouts_worker import Session

    architecture = larger()
    both_ways(architecture, directory)
    config = replace(tiny_config(sequence_length=24, micro_batch_size=4, global_batch_size=8), fp8=recipe)
    backend = TEBackend(fp8=recipe)
    first = Session(config, architecture, directory / "te", restore=False, backend=backend)
    first.train(0, 2)
    first.save(directory / "fp8", step=2)
    again = Session(config, architecture, directory / "fp8", backend=backend)
    return first.train(2, 4), again.train(2, 4)


def resumed(architecture, directory):
    """Two updates by each backend from `directory/te`, saved; the third by both: losses and gradient norms of the third."""
    from shared.model.backend import LOCAL
    from shared.model.te_backend import TEBackend
    from tests.shared.training.conftest import tiny_config
    from tests.shared.training.layouts_worker import Session

    config = tiny_config(sequence_length=24, micro_batch_size=4, global_batch_size=4)
    backends = {"te": TEBackend(), "local": LOCAL}
    rows = {}
    for name, backend in backends.items():
        first = Session(config, architecture, directory / "te", restore=False, backend=backend)
        first.train(0, 2)
        first.save(directory / f"{name}-2", step=2)
        rows[name] = first.train(2, 3)[0]
        for other in backends:
            again = Session(config, architecture, directory / f"{name}-2", backend=backends[other])
            rows[f"{name} to {other}"] = again.train(2, 3)[0]
    return rows


def in_layouts(rank, directory):
    """In a world of two: two updates in each layout, by each backend from the same weights; rank 0 writes them."""
    import torch
    from megatron.core import dist_checkpointing

    from shared.model import weights
    from shared.model.backend import LOCAL
    from shared.model.te_backend import TEBackend
    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize
    from shared.training.state import write_from_threads
    from tests.shared.training.conftest import tiny_config
    from tests.shared.training.layouts_worker import Session

    write_from_threads()
    rows, starts = {}, {}
    initialize(ParallelConfig(processes=2), 1)
    for name in {name for name, _ in LAYOUTS}:
        torch.manual_seed(1)
        starts[name] = directory / f"start-{name}"
        if rank == 0:
            starts[name].mkdir()
        torch.distributed.barrier()
        source = model_of(tiny_sizes()[name], LOCAL, initialised=True)
        weights._clear_padding(source)
        dist_checkpointing.save(weights.sharded_state_dict([source])["model"], str(starts[name]))
    for (name, layout), sizes in LAYOUTS.items():
        parallel = ParallelConfig(processes=2, **sizes)
        config = tiny_config(sequence_length=24, micro_batch_size=2, global_batch_size=4, parallel=parallel)
        for backend, modules in (("local", LOCAL), ("te", TEBackend())):
            session = Session(config, tiny_sizes()[name], starts[name], restore=False, backend=modules)
            rows[f"{name} {layout} {backend}"] = session.train(0, 2)
    if rank == 0:
        (directory / "layouts.json").write_text(json.dumps(rows))


def main(directory):
    written_out.install()
    from shared.runtime.device import select_device

    select_device()
    import torch

    environment = dict(os.environ)
    assert forked_world(2, in_layouts, directory), "a rank of the layouts failed"
    os.environ.clear()
    os.environ.update(environment)
    from megatron.core.utils import get_te_version

    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize

    initialize(ParallelConfig(), 1)
    torch.manual_seed(1)
    results = {"version": str(get_te_version()), "sizes": {}, "golden": {}, "both_ways": {}, "resumed": {}}
    results |= {"fp8": {}, "fp8_states": {}}
    sizes = tiny_sizes()
    for kind, work, names in (
        ("sizes", lambda name: compare(sizes[name]), sizes),
        ("golden", lambda _: golden(), ("contract-1",)),
        ("both_ways", lambda name: both_ways(sizes[name], directory / name), SAVED),
        ("resumed", lambda name: resumed(sizes[name], directory / name), RESUMED),
        ("fp8", lambda name: in_fp8(sizes[FP8], name, bf16_layers=(0, 0) if name == "delayed" else (1, 0)), RECIPES),
        ("fp8_states", lambda name: fp8_states(sizes[name], directory / name), (FP8,)),
    ):
        for name in names:
            try:
                results[kind][name] = work(name)
            except Exception:  # noqa: BLE001 -- reported by the test of this size; the others go on
                results[kind][name] = {"error": traceback.format_exc(limit=-6)}
    results["layouts"] = json.loads((directory / "layouts.json").read_text())
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
