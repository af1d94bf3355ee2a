"""The backend of a run: what is asked for, or what can be used."""

import importlib.util
import sys

import pytest

from shared.errors import UserError
from shared.families import registry
from shared.model import backend_choice
from shared.model.backend import LocalBackend
from shared.model.backend_choice import check_backend, choose_backend
from shared.model.fp8_backend import Fp8Backend
from shared.model.te_backend import TEBackend, left_out
from tests.shared.kernels.fp8.examples import recipe

LLAMA, MPT = (registry.sizes()[name] for name in ("tiny", "mpt-tiny"))


def choose(name, architecture=LLAMA, device_type="cuda", fp8=None):
    return choose_backend(name, architecture, device_type=device_type, attention_backend="eager", fp8=fp8, pipeline=1)


@pytest.fixture
def with_te(monkeypatch):
    """A GPU with TransformerEngine, as far as the choice can see."""
    monkeypatch.setattr(backend_choice, "_obstacle", lambda device_type: None)
    monkeypatch.setattr(backend_choice, "_gpu", lambda: {"capability": (9, 0), "cuda": (13, 0)})


def test_without_a_gpu_the_local_backend_is_used_and_says_why():
    backend, line = choose(None, device_type="cpu")
    assert (type(backend), backend.attention_backend) == (LocalBackend, "eager")
    assert line == "local: there is no GPU"


def test_without_the_package_the_local_backend_is_used_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    backend, line = choose(None)
    assert type(backend) is LocalBackend
    assert line.startswith("local: transformer_engine")


def test_with_both_transformer_engine_is_used(with_te):
    backend, line = choose(None)
    assert (type(backend), backend.attention_backend) == (TEBackend, "eager")
    assert line.startswith("te (TransformerEngine ")
    assert "local" not in line


def test_what_transformer_engine_lacks_is_named(with_te):
    assert choose("te", MPT)[1].endswith("; local in it: LayerNorm without bias")
    assert left_out(LLAMA) == []


def test_fp8_is_transformer_engines_where_it_has_the_recipe(with_te):
    backend, line = choose(None, fp8=recipe("blockwise"))
    assert (type(backend), backend.fp8) == (TEBackend, recipe("blockwise"))
    assert line.endswith("; FP8 has no guard and no counts in it")
    assert backend.config_fields()["fp8_recipe"] == "blockwise"
    for name, words in (("rowwise", "has no --fp8-recipe rowwise"), ("mxfp8", "compute capability 10.x")):
        backend, line = choose(None, fp8=recipe(name))
        assert (type(backend), backend.recipe) == (Fp8Backend, recipe(name))
        assert line.startswith("local: ")
        assert words in line
        with pytest.raises(UserError, match=rf"^--backend te: .*{words}.*; leave --backend out"):
            choose("te", fp8=recipe(name))
    assert type(choose("local", fp8=recipe("tensorwise"))[0]) is Fp8Backend
    assert choose("local", fp8=recipe("tensorwise"))[0].config_fields() == {}


def test_the_local_backend_may_be_asked_for(with_te):
    backend, line = choose("local")
    assert type(backend) is LocalBackend
    assert line == "local (--backend local)"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_te_is_refused_in_one_line_where_it_cannot_be_used(device_type, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(UserError, match=r"^--backend te: .*; .*leave --backend out") as error:
        choose("te", device_type=device_type)
    assert "\n" not in str(error.value)
    assert ("there is no GPU" if device_type == "cpu" else "transformer_engine") in str(error.value)


def test_te_is_refused_before_processes_start(monkeypatch):
    with pytest.raises(UserError, match=r"^--backend te: there is no GPU; leave --backend out"):
        check_backend("te", gpus=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^--backend te: transformer_engine is not installed; install transformer-engine\[pytorch"
    ):
        check_backend("te", gpus=1)
    for name in (None, "local"):
        check_backend(name, gpus=0)


def test_an_old_transformer_engine_is_not_used(monkeypatch):
    from megatron.core import utils
    from packaging.version import Version

    from shared.kernels.attention import needs

    monkeypatch.setattr(needs, "cannot_import", lambda module: None)
    monkeypatch.setattr(utils, "_te_version", Version("2.8"))
    assert choose(None)[1] == "local: transformer_engine 2.8 is older than 2.9"
