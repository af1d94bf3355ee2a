import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from shared.kernels.attention import needs
from shared.kernels.attention.needs import Carries, Features, Needs
from tests.references.attention import call

PLAIN = Needs(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    query_length=8,
    key_length=8,
    heads=4,
    groups=4,
    head_dim=64,
    value_dim=64,
)
SLOPES = torch.ones(4)


@pytest.mark.parametrize(
    ("given", "features"),
    [
        ({}, ()),
        ({"segments": torch.zeros(2, 8)}, ("packed rows",)),
        ({"segments": torch.zeros(2, 2, 8)}, ("prefix LM",)),
        ({"features": Features(window=7)}, ("window",)),
        ({"features": Features(window=8)}, ()),
        ({"features": Features(slopes_H=SLOPES)}, ("ALiBi",)),
        ({"features": Features(slopes_H=SLOPES, rounded_alibi=0.1)}, ("rounded ALiBi",)),
        ({"features": Features(softcap=1.0, sinks_H=SLOPES, dropout=0.1)}, ("soft cap", "sinks", "dropout")),
        ({"groups": 2}, ("grouped queries",)),
        ({"value_dim": 32}, ("value width",)),
        ({"queries": 3}, ("later queries",)),
    ],
)
def test_a_call_needs(given, features):
    q = torch.empty(2, 4, given.get("queries", 8), 64)
    k, v = (
        torch.empty(2, given.get("groups", 4), 8, 64),
        torch.empty(2, given.get("groups", 4), 8, given.get("value_dim", 64)),
    )
    found = call(q, k, v, given.get("segments"), given.get("features")).needs
    assert found.features == features
    assert (found.device, found.capability, found.dtype) == ("cpu", None, torch.float32)


@pytest.mark.parametrize(
    ("carries", "reasons"),
    [
        (Carries(), []),
        (Carries(devices=("cpu",)), ["CPU only"]),
        (Carries(dtypes=(torch.float16, torch.float32)), ["float16 and float32 only, not bfloat16"]),
        (Carries(capability=(9, 0)), []),
        (Carries(capability=(10, 0)), ["compute capability 9.0 is below 10.0"]),
        (Carries(below=(9, 0)), ["not for compute capability 9.0"]),
        (Carries(below=(10, 0)), []),
        (Carries(head_dim=64), []),
        (Carries(head_dim=56), ["head_dim 64 is above 56"]),
        (Carries(lacks={"sinks": "none"}), []),
    ],
)
def test_what_a_back_end_carries(carries, reasons):
    assert carries.reasons(PLAIN) == reasons


def test_every_lacking_feature_is_a_reason():
    sinks = replace(PLAIN, sinks=True, window=True, value_dim=128)
    carries = Carries(lacks={"sinks": "a", "window": "b", "dropout": "c"}, head_dim=100)
    assert carries.reasons(sinks) == ["head_dim 128 is above 100", "window: b", "sinks: a"]


def test_packages_that_cannot_be_imported(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "built_for_another.py").write_text("raise ImportError('undefined symbol: x\\nand more')\n")
    monkeypatch.setitem(sys.modules, "built_well", ModuleType("built_well"))
    assert needs.cannot_import("no_such.pytorch") == "no_such is not installed"
    assert needs.cannot_import("built_for_another") == "built_for_another does not import: undefined symbol: x"
    assert needs.cannot_import("built_well") is None
