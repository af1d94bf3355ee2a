"""Options that take no effect together are refused before anything begins."""

from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from shared.training.options import TrainingOptions
from shared.training.stage import plan


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"schedule": "constant", "min_learning_rate": 1e-5},
            "--min-learning-rate belongs to --schedule cosine or wsd",
        ),
        ({"schedule": "cosine", "decay_steps": 2}, "--decay-steps belongs to --schedule wsd, not cosine"),
        ({"schedule": "wsd", "decay_steps": 11, "warmup_steps": 0}, "--decay-steps 11 is longer than the run"),
    ],
)
def test_options_without_effect_name_the_flag(changes: dict[str, Any], problem: str) -> None:
    options = TrainingOptions(source=Path("a"), data=(Path("b"),), target=Path("c"), processes=1, **changes)
    with pytest.raises(UserError, match=problem):
        plan(options, steps=10, sequence_length=8)
