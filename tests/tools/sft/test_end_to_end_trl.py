"""20 updates against TRL's SFTTrainer on the same packed tokens: `make parity` records every model, here two are run."""

import re

import pytest

from tests.tools.sft import parity

RUN = [("qwen3_moe", True), ("bloom", False)]  # PEFT's adapters of experts, and ALiBi


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return parity.compare(tmp_path_factory.mktemp("parity"), RUN)


@pytest.mark.parametrize(("model", "lora"), RUN)
def test_losses_are_trls(results, model, lora):
    ours, theirs = results[parity.case_name(model, lora=lora)]
    assert parity.difference(ours, theirs) < parity.TOLERANCE
    assert ours[0][1] == pytest.approx(theirs[0][1], rel=1e-5)  # fp32 sums in another order
    assert ours[-1][0] < ours[0][0] - 0.1


def test_the_table_has_every_model_within_the_tolerance():
    figures = re.findall(r"\| (\S+e-\d+) \| \S+e-\d+ \|$", parity.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(figures) == len(parity.CASES)
    assert max(map(float, figures)) <= parity.TOLERANCE
