"""What is announced is what a model's layers do."""

import pytest
import torch

from shared.errors import UserError
from shared.families import registry
from shared.kernels.attention import choose
from shared.model.attention_plan import attention_plan
from shared.model.backend import LocalBackend
from shared.parallel import ParallelConfig

LINES = {
    "tiny": ["segments (packed rows, grouped queries)"],
    "gemma2-tiny": [
        "segments (packed rows, window, soft cap, grouped queries)",
        "segments (packed rows, soft cap, grouped queries)",
    ],
    "deepseek-v2-tiny": ["segments (packed rows, value width)"],
    "bloom-tiny": ["segments (packed rows, ALiBi)"],
    "gpt-oss-tiny": [
        "segments (packed rows, window, sinks, grouped queries)",
        "segments (packed rows, sinks, grouped queries)",
    ],
    "glm-10b-tiny": ["sdpa (prefix LM)"],
    "qwen3-next-tiny": ["segments (packed rows, grouped queries)"],
}


def plan(architecture, **given):
    arguments = {"sequence_length": 64, "packed": True, "name": None, "parallel": ParallelConfig(), **given}
    return attention_plan(architecture, dtype=torch.float32, device=torch.device("cpu"), **arguments)


@pytest.mark.parametrize("size", LINES)
def test_a_line_for_each_kind_of_layer(size):
    architecture = registry.sizes()[size].with_values(attention={"dropout": 0.0})
    assert plan(architecture, sequence_length=4096) == LINES[size]  # longer than every window


@pytest.mark.parametrize("size", ["tiny", "gemma2-tiny", "deepseek-v2-tiny", "bloom-tiny", "gpt-oss-tiny"])
def test_layers_need_what_the_plan_says(size, model_of, monkeypatch):
    architecture = registry.sizes()[size]
    planned, used, original = set(), set(), choose.choose
    windows = [kind.mixer.window for kind in architecture.kinds if getattr(kind.mixer, "window", None)]
    length = min(windows, default=40) + 8

    def recording(into):
        return lambda needs, name=None: into.add(needs) or original(needs, name)

    monkeypatch.setattr("shared.model.attention_plan.choose", recording(planned))
    plan(architecture, sequence_length=length)
    model = model_of(architecture).train()
    monkeypatch.setattr(choose, "choose", recording(used))
    rows = torch.arange(length)[None] // 30
    model(torch.randint(64, (1, length)), torch.arange(length)[None], rows)
    assert used == planned


def test_a_named_back_end_is_used_by_every_layer(model_of, monkeypatch):
    architecture = registry.sizes()["gemma2-tiny"]
    assert plan(architecture, name="eager")[0].startswith("eager (")
    names = []
    attend = choose.BACK_ENDS["eager"].attend
    monkeypatch.setitem(
        choose.BACK_ENDS,
        "eager",
        choose.BackEnd(
            attend=lambda *given: names.append("eager") or attend(*given),
            carries=choose.BACK_ENDS["eager"].carries,
            unavailable=lambda: None,
        ),
    )
    chosen, eager = model_of(architecture), model_of(architecture, backend=LocalBackend(attention_backend="eager"))
    eager.load_state_dict(chosen.state_dict())
    given = torch.randint(64, (1, 64)), torch.arange(64)[None], torch.arange(64)[None] // 30
    with torch.no_grad():
        found, expected = eager(*given), chosen(*given)
    assert len(names) == architecture.num_layers
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # fp32, two orders of sums


def test_a_named_back_end_that_does_not_carry_a_layer_is_refused():
    with pytest.raises(UserError, match="--attention-backend sdpa does not carry .* packed rows: "):
        plan(registry.sizes()["tiny"], name="sdpa")
    assert plan(registry.sizes()["tiny"], name="sdpa", packed=False) == ["sdpa (grouped queries)"]


def test_context_parallel_ranks_have_parts_of_a_row_or_of_the_heads():
    tiny = registry.sizes()["tiny"]
    gathered = ParallelConfig(processes=2, context=2)
    assert plan(tiny, parallel=gathered, packed=False) == ["segments (grouped queries, later queries)"]
    exchanged = ParallelConfig(processes=2, context=2, context_exchange="heads")
    assert plan(tiny, parallel=exchanged, packed=False) == ["sdpa (grouped queries)"]
