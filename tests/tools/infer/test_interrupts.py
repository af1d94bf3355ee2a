"""Ctrl-C while a model loads: what the started processes get, and what this one gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

# As vLLM's workers do: a process made by multiprocessing, with a handler of its own that ends it, and a child of that one.
PARENT = """
import multiprocessing, os, signal, subprocess, sys, threading, time
from shared.cli import _install_signals
from tools.infer.interrupts import kept_from_children

def worker(queue):
    def end(number, frame):
        raise SystemExit(3)
    signal.signal(signal.SIGINT, end)
    program = "import sys; sys.stdin.read(); print('grandchild lives', flush=True)"
    grandchild = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    queue.put("started")
    queue.get()
    grandchild.stdin.close()
    raise SystemExit(grandchild.wait())

if __name__ == "__main__":
    _install_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a script
    method, when = sys.argv[1:]
    context = multiprocessing.get_context(method)
    try:
        with kept_from_children():
            queue, back = context.Queue(), context.Queue()
            process = context.Process(target=worker, args=(queue,))
            process.start()
            print(queue.get(), flush=True)
            if when == "loading":
                time.sleep(60)
        print("loaded", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        time.sleep(0.3)
        print("worker", process.exitcode, flush=True)
        queue.put("end")
        process.join()
        print("worker", process.exitcode, flush=True)
"""


@pytest.mark.parametrize(
    ("method", "when"), [("spawn", "loading"), ("spawn", "loaded"), ("fork", "loading"), ("fork", "loaded")]
)
def test_a_terminals_interrupt_reaches_this_process_alone(method, when, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    parent = subprocess.Popen(
        [sys.executable, script, method, when], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert parent.stdout
        assert parent.stdout.readline() == "started\n"
        if when == "loaded":
            assert parent.stdout.readline() == "loaded\n"
        began = time.monotonic()
        os.killpg(parent.pid, signal.SIGINT)  # as the terminal does
        assert parent.stdout.readline() == "interrupted\n"
        assert time.monotonic() - began < 10
        said = parent.stdout.read().splitlines()
        assert said[0] == "worker None", "the worker has ended"
        assert said[1:] == ["grandchild lives", "worker 0"]
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
