"""The engine interface: choice of the engine, refused settings, streamed text."""

from __future__ import annotations

import pytest

from shared.errors import UserError
from tests.tools.infer.engines.double import EngineDouble
from tools.infer.engines.engine import Engine, EngineSettings, open_engine, pieces


def test_the_double_is_an_engine():
    assert isinstance(EngineDouble(), Engine)


def test_settings_choose_the_engine(monkeypatch, tmp_path):
    for name, place in (("vllm", "vllm.VllmEngine"), ("hf", "transformers.TransformersEngine")):
        monkeypatch.setattr(f"tools.infer.engines.{place}", lambda source, settings: (source, settings.engine))
        assert open_engine(tmp_path, EngineSettings(engine=name)) == (tmp_path, name)


def test_tensor_parallel_is_vllms():
    with pytest.raises(UserError, match="--tensor-parallel belongs to --engine vllm"):
        EngineSettings(engine="hf", tensor_parallel=2)


def test_an_incomplete_character_waits_for_its_rest():
    grown = [("a", False), ("a\N{REPLACEMENT CHARACTER}", False), ("aé", False), ("aé\N{REPLACEMENT CHARACTER}", True)]
    assert list(pieces(grown)) == ["a", "", "é", "\N{REPLACEMENT CHARACTER}"]
