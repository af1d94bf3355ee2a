"""The user's reward functions: whatever they do, the run ends with one line and never as if it were done."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shared.errors import Interrupted, StageError, UserError
from tools.rlhf.data import Prompt
from tools.rlhf.rewards import time_limit
from tools.rlhf.rewards.python_function import FunctionReward
from tools.rlhf.rollout.rollout import Reply

ROOT = Path(__file__).parents[4]
PROMPTS = [Prompt(text="say", ids=(1,), columns={"answer": word}) for word in ("a", "b")]
REPLIES = [Reply(ids=(1,), text=text, ended=True) for text in ("xa", "x")]


@pytest.fixture
def reward(tmp_path):
    """A function from a file's text to its `f`, loaded and checked."""
    before = list(sys.path)

    def load(text, seconds=60.0):
        file = tmp_path / "my_reward.py"
        file.write_text(text)
        scorer = FunctionReward(file, "f", seconds=seconds)
        scorer.check(PROMPTS)
        return scorer

    yield load
    sys.path[:] = before
    for name in ("my_reward", "my_helper"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "body", ["import sys\nsys.exit(0)", "raise SystemExit", "1 / 0", "import no_such_module", "def"]
)
def test_a_file_that_does_not_load_is_named(reward, body):
    with pytest.raises(UserError, match=r"my_reward.py:f: the file does not load: "):
        reward(body)
    assert "my_reward" not in sys.modules


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("def f(prompts, completions, answer): return [a in t for a, t in zip(answer, completions)]", [1.0, 0.0]),
        (
            "def f(completions, answer, **kwargs): return [float(a in t) for a, t in zip(answer, completions)]",
            [1.0, 0.0],
        ),
        ("def f(completions): return [len(t) for t in completions]", [2.0, 1.0]),
        ("def f(answer, completions, prompts, other=3): return [other, len(prompts)]", [3.0, 2.0]),
        ("def f(*, completions, **columns): return (len(t) for t in completions)", [2.0, 1.0]),
        ("async def f(completions, **columns): return [len(t) for t in completions]", [2.0, 1.0]),
        ("import torch\ndef f(completions, **columns): return torch.tensor([2.0, 1.0])", [2.0, 1.0]),
        ("import numpy\ndef f(completions, **columns): return numpy.array([2, 1])", [2.0, 1.0]),
        ("def f(completions, **columns): return [None, 1]", [math.nan, 1.0]),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass R:\n    w: float = 2.0\n"
            "def f(completions, **columns): return [R().w] * len(completions)",
            [2.0, 2.0],
        ),
        (
            "from concurrent.futures import ProcessPoolExecutor\ndef one(t): return len(t)\n"
            "def f(completions, **columns):\n    with ProcessPoolExecutor(1) as pool: return list(pool.map(one, completions))",
            [2.0, 1.0],
        ),
    ],
)
def test_the_forms_that_people_write(reward, text, scores):
    assert reward(text)(PROMPTS, REPLIES) == pytest.approx(scores, nan_ok=True)


def test_modules_beside_the_file_are_imported_also_in_the_call(reward, tmp_path):
    (tmp_path / "my_helper.py").write_text("def score(text): return len(text)")
    for text in (
        "from my_helper import score\ndef f(completions): return list(map(score, completions))",
        "def f(completions):\n    import my_helper\n    return list(map(my_helper.score, completions))",
    ):
        sys.modules.pop("my_helper", None)
        assert reward(text)(PROMPTS, REPLIES) == [2.0, 1.0]


@pytest.mark.parametrize("name", ["json.py", "my.reward-2.py"])
def test_a_file_with_the_name_of_a_library_or_of_no_module(tmp_path, name):
    (tmp_path / name).write_text("def f(completions): return [0.0] * len(completions)")
    assert FunctionReward(tmp_path / name, "f")(PROMPTS, REPLIES) == [0.0, 0.0]
    import json

    assert json.loads("1") == 1
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "def f(prompts, completions, label): return []",
            "wants an argument 'label'; it gets prompts, completions, answer",
        ),
        ("def f(texts, completions): return []", "wants an argument 'texts'"),
        ("def f(prompts, completions, /): return []", "takes 'prompts' by position only"),
    ],
)
def test_a_signature_that_cannot_be_served_is_refused_before_the_run(reward, text, says):
    with pytest.raises(UserError, match=says):
        reward(text)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 1.0", "gave float, not one number for each completion"),
        ("return '12'", "gave str"),
        ("return ['1', '2']", "'1' is not a number"),
        ("return [1.0]", "gave 1 rewards for 2"),
        ("return [float('nan'), 1]", "gave nan"),
        ("import sys; sys.exit()", "failed: SystemExit"),
        ("raise GeneratorExit", "failed: GeneratorExit"),
    ],
)
def test_a_failing_call_is_named(reward, body, says):
    with pytest.raises(StageError, match=says):
        reward(f"def f(completions):\n    {body}")(PROMPTS, REPLIES)


@pytest.mark.parametrize(
    "body", ["time.sleep(60)", "\n    while True: pass", "\n    try: time.sleep(60)\n    except: 1 / 0"]
)
def test_a_call_over_its_limit_ends(reward, body):
    began = time.monotonic()
    scorer = reward(f"import time\ndef f(completions):\n    {body}", seconds=0.3)
    with pytest.raises(StageError, match=r"my_reward.py:f took longer than 0.3 s \(--reward-timeout\)"):
        scorer(PROMPTS, REPLIES)
    assert time.monotonic() - began < 10


def test_a_file_over_its_limit_ends(reward):
    with pytest.raises(UserError, match=r"loading .* took longer than 0.3 s"):
        reward("import time\ntime.sleep(60)", seconds=0.3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_call_that_stalls_and_waits_for_one_that_does_not(reward, monkeypatch, number):
    monkeypatch.setattr(time_limit, "STOP_SECONDS", 0.5)
    received = []
    before = signal.signal(number, lambda *_: received.append(1))
    try:
        for seconds in (0.4, 60):
            scorer = reward(f"import time\ndef f(completions):\n    time.sleep({seconds})\n    return [1, 2]")
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            if seconds < 1:
                assert scorer(PROMPTS, REPLIES) == [1.0, 2.0]
            else:
                with pytest.raises(
                    Interrupted, match="stopped by a signal while .*my_reward.py:f ran; run the same command"
                ):
                    scorer(PROMPTS, REPLIES)
        assert len(received) == 2  # the loop learns of both
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(number, before)


def test_a_call_that_cannot_be_interrupted_ends_the_process(tmp_path):
    """As compiled code that does not return to Python: here one that swallows every exception."""
    (tmp_path / "f.py").write_text(
        "import time\ndef f(completions):\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass"
    )
    program = (
        "from tools.rlhf.rewards import time_limit\ntime_limit.UNWIND_SECONDS = 0.3\n"
        "from tools.rlhf.rewards.time_limit import call_within\nimport runpy, sys\n"
        f"f = runpy.run_path({str(tmp_path / 'f.py')!r})['f']\ncall_within(lambda: f([]), 0.3, where='the reward')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (
        1,
        "the reward took longer than 0.3 s, and it cannot be interrupted; nothing is published\n",
    )
