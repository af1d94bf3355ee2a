"""Runs `pretrain train` in forks of one process that has imported torch, and kills them at random moments.

    kill_worker.py KILLS SEED TARGET WORDS...    # WORDS: the command line without --target

TARGET-0 is not killed, and gives the time of a run. TARGET-1, TARGET-2, ... are finished runs, each killed and resumed several
times; the caller compares them. Every second start saves asynchronously.
After every kill the directory must open, with the content that its manifest says. Prints a JSON object.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[3]))

from shared.runtime.silence_warnings import silence

silence()

import shared.training.loop  # noqa: E402, F401 -- imported once, for all forks
from shared.checkpoint.directory.open import open_checkpoint  # noqa: E402
from tools.pretrain.cli import tool  # noqa: E402


def start(words: list[str], output: Path) -> int:
    """The command in a fork; its process id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        tool.run(words)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:  # noqa: BLE001 -- no exception may reach the loop of `main`
        os._exit(70)
    os._exit(0)


def finish(words: list[str], output: Path) -> None:
    """The command to its end."""
    assert os.waitstatus_to_exitcode(os.waitpid(start(words, output), 0)[1]) == 0, output.read_text()[-3000:]


def main(kills: int, seed: int, target: Path, words: list[str]) -> None:
    chance = random.Random(seed)
    done, runs, starts, saved = 0, 1, 0, []
    killed = [0, 0]  # while saving synchronously, asynchronously
    began = time.monotonic()
    finish([*words, f"--target={target}-0"], target.with_suffix(".log"))
    longest = time.monotonic() - began  # of a run that nothing disturbs
    while done < kills:
        run = target.with_name(f"{target.name}-{runs}")
        output = run.with_suffix(".log")
        starts += 1
        asynchronous = ["--async-save"] if starts % 2 else []
        child, began = start([*words, f"--target={run}", *asynchronous], output), time.monotonic()
        deadline = began + chance.uniform(0.1, 1.1) * longest
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            killed[bool(asynchronous)] += 1
            if (run / "manifest.json").exists():
                saved.append(open_checkpoint(run, kinds=("megatron",), flag="--source").manifest.iteration)
            continue
        assert os.waitstatus_to_exitcode(status) == 0, output.read_text()[-3000:]
        runs += 1
    finish([*words, f"--target={target}-{runs}"], target.with_suffix(".log"))
    told = {"kills": done, "asynchronous": killed[True], "runs": runs + 1}
    print(json.dumps({**told, "after a save": len(saved), "iterations": sorted(set(saved))}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
