"""Marks tests that need trlx, which is in no package index: `make test-trlx` with BATON_TRLX set runs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


def needs_trlx[F: Callable[..., Any]](test: F) -> F:
    """A test that is skipped where BATON_TRLX names no trlx."""
    skipped = pytest.mark.skipif(not os.environ.get("BATON_TRLX"), reason="needs trlx at BATON_TRLX: make test-trlx")
    return pytest.mark.trlx(skipped(test))
