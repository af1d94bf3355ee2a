"""Runs `infer` commands in forks of one process that has imported vLLM: the import is most of a command's time.

Started by the fixture of the same name. Reads a JSON object a line on stdin and answers on stdout:
    {"run": [argv...], "stdin": PATH, "stdout": PATH, "stderr": PATH} -> {"pid": N}
    {"wait": N}                                                       -> {"code": exit code}
A command runs in the fork as the console script runs it. If argv begins with a Python file, the fork runs that file.
"""

import json
import os
import runpy
import signal
import sys
import traceback

from tools.infer.environment import prepare_environment

prepare_environment()

import lm_eval.models.huggingface  # noqa: E402
import lm_eval.models.vllm_causallms  # noqa: E402, F401
import vllm.entrypoints.launchers.api_server.entry  # noqa: E402
import vllm.v1.engine.async_llm  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
from vllm import LLM, EngineArgs, ModelRegistry  # noqa: E402, F401

from tools.infer.cli import tool  # noqa: E402


def run(request: dict) -> int:
    """Fork, point the standard streams at files, run the command. The child's process id."""
    child = os.fork()
    if child:
        return child
    for descriptor, (name, flags) in enumerate(
        (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_CREAT), ("stderr", os.O_WRONLY | os.O_CREAT))
    ):
        os.dup2(os.open(request[name], flags, 0o644), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 -- lives as long as the process
    code = 1
    try:
        sys.argv[1:] = request["run"]
        if sys.argv[1].endswith(".py"):
            del sys.argv[0]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        else:
            tool.run(sys.argv[1:])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 -- no exception may reach the loop of `main`
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Answer requests until stdin ends, then kill the commands that still run, such as the server of a failed test."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running = set()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "run" in request:
            answer = {"pid": run(request)}
            running.add(answer["pid"])
        else:
            running.discard(request["wait"])
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        print(json.dumps(answer), flush=True)
    for child in running:
        os.kill(child, signal.SIGKILL)
    os._exit(0)  # without the teardown of vLLM, which takes half a minute on a busy machine


if __name__ == "__main__":
    main()
