"""Random calls of attention, with every combination of features, on every back end that carries them, against one query at a
time in float64: outputs, and the gradients of queries, keys, values and sinks.

The back ends for CUDA run here over the contract of their kernels, written out in `tests.references.flash`: what is tried is
the arguments that they prepare. On a GPU the kernels themselves are tried, in bf16.
"""

from collections import Counter

import pytest
import torch

from shared.kernels.attention import alibi, masks, needs, segments, te_attention, variable_length
from shared.kernels.attention.choose import BACK_ENDS, choose
from shared.kernels.attention.needs import Features
from tests.references import flash
from tests.references.attention import attention, call

CALLS = 200
CPU = torch.device("cpu")


class Random:
    """A random call: tensors, features, and the result by the formula."""

    def __init__(self, seed, dtype=torch.float64):
        self.generator, self.plain = torch.Generator().manual_seed(seed), seed % 5 == 0
        groups, repeats = self.number(1, 2), self.number(1, 3)
        heads, batch, keys = groups * repeats, self.number(1, 2), self.number(1, 12)
        head_dim = self.number(1, 10)
        value_dim = self.number(1, 10) if self.maybe() else head_dim
        queries = self.number(1, keys) if self.feature() else keys
        self.segments = self.random_segments(batch, keys + self.number(0, 3))  # of whole rows
        window = self.number(1, keys + 2) if self.feature() else None
        slopes = alibi.slopes(heads) if self.feature() else None
        self.features = Features(
            scale=0.7 if self.maybe() else None,
            window=window,
            softcap=1.5 if self.feature() else None,
            sinks_H=self.normal(heads).requires_grad_() if self.feature() else None,
            slopes_H=slopes,
            rounded_alibi=0.4 if slopes is not None and self.maybe() else None,
        )
        shapes = (batch, heads, queries, head_dim), (batch, groups, keys, head_dim), (batch, groups, keys, value_dim)
        self.tensors = [self.normal(*shape).to(dtype).requires_grad_() for shape in shapes]
        self.weights = self.normal(batch, heads, queries, value_dim).to(dtype)

    def number(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def maybe(self):
        return self.number(0, 2) == 0

    def feature(self):
        """Every fifth call has none."""
        return self.maybe() and not self.plain

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def random_segments(self, batch, keys):
        kind = self.number(0, 4)
        if kind < 2:
            return None
        rows = torch.randint(0, 2, (batch, keys), generator=self.generator).cumsum(1) // 2
        if kind < 4:
            return rows if self.maybe() else rows[:1].repeat(batch, 1)
        starts = masks.positions_and_starts(rows)[1]
        return masks.prefix_segments(starts, starts + self.number(0, 4))

    @property
    def call(self):
        return call(*self.tensors, self.segments, self.features)

    def results(self, attend):
        """The output and all gradients."""
        leaves = [*self.tensors, *([self.features.sinks_H] if self.features.sinks_H is not None else [])]
        found = attend(self.call)
        return [found.detach(), *torch.autograd.grad((found * self.weights).sum(), leaves)]

    @staticmethod
    def formula(given):
        """By `tests.references`."""
        q, k, v, rows, features = given.q_BHQD, given.k_BGKD, given.v_BGKV, given.segments, given.features
        (batch, _, queries, head_dim), keys = q.shape, k.shape[2]
        start = keys - queries
        numbers = torch.zeros(batch, keys, dtype=torch.long) if rows is None else rows[..., :keys]
        allowed = masks.dense(numbers)[:, 0]
        if features.window is not None:
            distance = torch.arange(keys)[:, None] - torch.arange(keys)[None, :]
            allowed = allowed & (distance < features.window)
        bias = None
        if features.slopes_H is not None:
            positions = masks.segment_positions(numbers if numbers.ndim == 2 else numbers[:, 0])
            own = alibi.bias if features.rounded_alibi is None else alibi.rounded_bias
            bias = (own(features.slopes_H, positions, positions) * (features.rounded_alibi or 1.0)).double()
            bias = bias[:, :, start:]
        scale = head_dim**-0.5 if features.scale is None else features.scale
        chosen = allowed[:, start:]
        return attention(q, k, v, chosen, scale, features.softcap, features.sinks_H, bias)


@pytest.fixture
def kernels(monkeypatch):
    """The back ends with packages and operators that run here."""
    flash.install_flash_attn_2(monkeypatch)
    flash.install_flash_attn_3(monkeypatch)
    flash.install_transformer_engine(monkeypatch)
    te_attention._module.cache_clear()
    library = flash.register_for_torch()
    yield
    library._destroy()
    te_attention._module.cache_clear()


def test_every_back_end_computes_what_it_says_it_carries(kernels, monkeypatch):
    tried = Counter()
    for seed in range(CALLS):
        monkeypatch.setattr(segments, "BLOCK", 3 if seed % 2 else 1024)
        random = Random(seed)
        expected = random.results(random.formula)
        for name, back_end in BACK_ENDS.items():
            if any(feature in back_end.carries.lacks for feature in random.call.needs.features):
                continue
            tried.update((name, feature) for feature in random.call.needs.features)
            found = random.results(back_end.attend)
            for ours, theirs in zip(found, expected, strict=True):
                # float64 sums of 12 terms in another order; ALiBi's bias is an fp32 number for all.
                assert torch.allclose(ours, theirs, atol=1e-10, rtol=0), (name, seed, (ours - theirs).abs().max())
    carried = {
        (name, feature)
        for name, back_end in BACK_ENDS.items()
        for feature in needs.Feature.__args__
        if feature not in back_end.carries.lacks and feature != "dropout"
    }
    assert {pair for pair in carried if tried[pair] < 5} == set()


def test_the_choice_for_every_call_is_a_back_end_that_carries_it():
    for seed in range(CALLS):
        random = Random(seed)
        chosen = choose(random.call.needs)
        assert chosen in ("sdpa", "segments", "eager")
        assert not any(feature in BACK_ENDS[chosen].carries.lacks for feature in random.call.needs.features)


def test_dropout_keeps_the_expectation_and_drops(kernels):
    """One value everywhere: without dropout every output is that value."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 4, 200, 8, generator=generator) for _ in range(2))
    v = torch.ones(2, 4, 200, 8)
    packed = (torch.arange(200) // 60).expand(2, -1)
    torch.manual_seed(1)
    for name in ("eager", "sdpa", "segments"):
        for rows in (None, packed):
            if rows is not None and name == "sdpa":
                continue
            out = BACK_ENDS[name].attend(call(q, k, v, rows, Features(dropout=0.25)))
            assert out.var() > 0.01
            assert abs(out.mean() - 1) < 0.02


@pytest.mark.parametrize(
    "features", [Features(softcap=2.0, dropout=0.5), Features(window=40, softcap=2.0, dropout=0.5)]
)
def test_blocks_drop_the_same_weights_in_the_backward_pass(features, monkeypatch):
    """Blocks that are computed again. `out` is linear in `v`: the gradient of `(out * w).sum()` times `v` is that sum."""
    monkeypatch.setattr(segments, "BLOCK", 32)
    torch.manual_seed(1)
    q, k, v, weights = (torch.randn(1, 2, 100, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    total = (segments.attend(call(q, k, v, None, features)) * weights.detach()).sum()
    (gradient,) = torch.autograd.grad(total, v)
    torch.testing.assert_close((gradient * v).sum(), total, atol=1e-10, rtol=0)


def test_layouts_are_made_once_for_a_tensor_of_segments(kernels):
    rows = torch.tensor([[1, 1, 2, 2]])
    q = torch.randn(1, 1, 4, 8)
    before = len(variable_length._layouts)
    lengths = [variable_length.pack(call(q, q, q, rows)).lengths for _ in range(3)]
    assert lengths[0] is lengths[1] is lengths[2]
    assert len(variable_length._layouts) == before + 1
    del rows, lengths
    assert len(variable_length._layouts) == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in BACK_ENDS if name != "eager"])
def test_kernels_of_a_gpu_compute_what_they_carry(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tried = 0
    for seed in range(CALLS):
        random = Random(seed)
        expected = random.results(random.formula)
        half = Random(seed, torch.bfloat16)
        half.tensors = [x.detach().cuda().requires_grad_() for x in half.tensors]
        half.weights = half.weights.cuda()
        half.segments = None if half.segments is None else half.segments.cuda()
        if half.features.sinks_H is not None:
            sinks = half.features.sinks_H.detach().cuda().requires_grad_()
            half.features = Features(**{**vars(half.features), "sinks_H": sinks})
        if reasons := BACK_ENDS[name].reasons(half.call.needs):
            if not tried and "installed" in reasons[0]:
                pytest.skip(reasons[0])
            continue
        tried += 1
        for ours, theirs in zip(half.results(BACK_ENDS[name].attend), expected, strict=True):
            # bf16 has 8 bits; inputs are rounded to it, and gradients are sums of up to 60 numbers of size 1.
            torch.testing.assert_close(ours.double().cpu(), theirs, atol=6e-2, rtol=6e-2)
    assert tried > 10
