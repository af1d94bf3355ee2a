"""A model's linear layers, norms and core attention come from its backend."""

import inspect
from collections import Counter
from pathlib import Path

import pytest
import torch

from shared.families import registry
from shared.model import backend as backends
from shared.model.backend import LocalBackend
from shared.runtime.device import select_device

select_device()

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402

from shared.model.attention import CoreAttention  # noqa: E402

SIZES = {
    "dense": "qwen3-tiny",
    "dense with a norm behind": "olmo2-tiny",
    "clipped": "mpt-tiny-clipped",
    "MoE": "qwen3-moe-tiny-mixed",
    "MoE with shared experts and a gated delta net": "qwen3-next-tiny",
    "MoE with biases": "gpt-oss-tiny",
    "MLA without q_lora_rank": "moonlight-tiny",
    "MLA, MoE, MTP": "deepseek-v3-tiny",
    "factorised": "opt-350m-tiny",
}


class Recording(LocalBackend):
    """Linear layers that count their forward passes and multiply their products; norms and products of attention count."""

    def __init__(self, factors=None) -> None:
        self.calls: Counter[tuple[str, int, bool]] = Counter()
        self.factors = factors or {}  # by kind, layer and whether it is an expert's
        self.norms, self.attention = 0, 0

    def _linear(self, base: type, *place) -> type:
        recording = self

        class Linear(base):
            def _forward_impl(self, *args, **kwargs):
                recording.calls[place] += 1
                return super()._forward_impl(*args, **kwargs) * recording.factors.get(place, 1.0)

        return Linear

    def column_parallel_linear(self, layer, *, expert=False):
        return self._linear(ColumnParallelLinear, "column", layer, expert)

    def row_parallel_linear(self, layer, *, expert=False):
        return self._linear(RowParallelLinear, "row", layer, expert)

    def norm(self, norm, *, extra_state):
        plain = super().norm(norm, extra_state=extra_state)

        def build(**kwargs):
            self.norms += 1
            return plain(**kwargs)

        return build

    def core_attention(self):
        recording = self

        class Product(CoreAttention):
            def forward(self, *args, **kwargs):
                recording.attention += 1
                return super().forward(*args, **kwargs)

        return Product


def inputs(architecture):
    depth = architecture.mtp.depth if architecture.mtp else 0
    ids = torch.randint(architecture.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = torch.stack([ids] * (1 + depth)) if depth else ids
    return {"input_ids": ids, "position_ids": torch.arange(24)[None], "attention_mask": None, "labels": labels}


@pytest.mark.parametrize("name", SIZES)
def test_no_linear_layer_escapes(name, model_of):
    """Of decoder and MTP: each is a class of the backend, in the layer that it was asked for, and is run."""
    architecture = registry.sizes()[SIZES[name]]
    backend = Recording()
    model = model_of(architecture, backend=backend)
    modules = [*model.decoder.named_modules(), *(model.mtp.named_modules() if architecture.mtp else ())]
    linears = [(path, each) for path, each in modules if isinstance(each, ColumnParallelLinear | RowParallelLinear)]
    foreign = [path for path, each in linears if not type(each).__qualname__.startswith("Recording.")]
    assert linears
    assert foreign == []
    model(**inputs(architecture))
    kinds = Counter("column" if isinstance(each, ColumnParallelLinear) else "row" for _, each in linears)
    assert {kind for kind, _, _ in backend.calls} == kinds.keys()
    depth = architecture.mtp.depth if architecture.mtp else 0
    assert {layer for _, layer, _ in backend.calls} == {*range(architecture.num_layers + depth)}
    assert any(expert for _, _, expert in backend.calls) == (architecture.moe is not None)
    plain = [path for path, each in linears if not getattr(each, "is_expert", False)]
    assert sum(backend.calls[place] for place in backend.calls if not place[2]) == len(plain)
    assert backend.attention == sum("core_attention" in path.split(".")[-1] for path, _ in modules)


@pytest.mark.parametrize("name", SIZES)
def test_the_local_backend_is_the_default_and_a_subclass_of_its_classes_computes_the_same(name, model_of):
    architecture = registry.sizes()[SIZES[name]]
    plain, recorded = model_of(architecture), model_of(architecture, backend=Recording())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    recorded.load_state_dict(plain.state_dict())
    assert torch.equal(plain(**inputs(architecture)), recorded(**inputs(architecture)))


@pytest.mark.parametrize("name", SIZES)
def test_each_place_is_a_choice_of_its_own(name, model_of):
    """Another product in one kind of layer, at one index, of experts or not, changes the model's losses."""
    architecture = registry.sizes()[SIZES[name]]
    model_of(architecture, backend=(first := Recording()))(**inputs(architecture))
    first.calls.clear()
    model = model_of(architecture, backend=first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        usual = model(**inputs(architecture))
        assert first.calls
        for place in list(first.calls):
            first.factors = {place: 1.5}
            assert not torch.equal(model(**inputs(architecture)), usual), place


def test_norms_are_the_backends(model_of):
    for size, norms in {"qwen3-tiny": 2 * 2 + 1, "olmo2-tiny": 2 * 2 + 1, "bloom-tiny": 2 * 2 + 1 + 1}.items():
        architecture = registry.sizes()[size]
        backend = Recording()
        model_of(architecture, backend=backend)
        assert backend.norms == norms, size


def test_no_other_module_names_a_linear_layer_or_builds_a_norm():
    folder = Path(inspect.getfile(backends)).parent
    words = ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding", "SequentialMLP", "norm_of(")
    allowed = {"backend.py", "te_backend.py", "norm.py", "experts.py"}
    found = {
        (path.name, word)
        for path in folder.glob("*.py")
        if path.name not in allowed
        for word in words
        if word in path.read_text()
    }
    assert found == set()
