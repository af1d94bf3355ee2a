"""`infer serve`: vLLM's OpenAI server on a directory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import os
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from shared.cli import log
from shared.errors import EXIT_DONE, EXIT_INTERRUPTED, Interrupted, StageError, UserError
from tools.infer.engine import check_supported, model_config, open_source, reason
from tools.infer.prompts import load_tokenizer
from tools.infer.settings import engine_arguments, on_gpu, prepare_environment

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_PR_SET_PDEATHSIG = 1  # of prctl(2)


def run(
    source: Path,
    *,
    host: str,
    port: int,
    served_model_name: str | None,
    max_model_len: int | None,
    precision: str | None,
    tensor_parallel: int,
    batch_size: int | None,
) -> None:
    """Serve until SIGTERM or SIGINT, or SIGUSR1, which raises Interrupted.

    UserError for what cannot be served, StageError if the engine dies.
    """
    signal.signal(signal.SIGTERM, _leave)  # a server that is told to stop has done its work, also while it loads
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGUSR1, _leave_for_now)
    with bind(host, port) as listener:
        prepare_environment()
        model = open_source(source)
        check_supported(model)
        load_tokenizer(model)  # what vLLM would find out in the midst of its start
        arguments = engine_arguments(
            model,
            precision=precision,
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            batch_size=batch_size,
        )
        model_config(arguments)
        name = served_model_name or source.resolve().name
        import uvloop

        uvloop.run(_serve(listener, host, arguments, name))
    if _exit_code == EXIT_INTERRUPTED:
        raise Interrupted("the time was up; the same command serves again")


_exit_code = EXIT_DONE  # of a server that was told to stop


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_exit_code)


def _leave_for_now(signum: int, frame: FrameType | None) -> None:
    """Slurm's warning that the time is up: stop as SIGTERM does, with the exit code that says: start it again."""
    global _exit_code
    _exit_code = EXIT_INTERRUPTED
    os.kill(os.getpid(), signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """The listening address, taken before the long load and kept. UserError if it is not to be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)  # a second server on the same port is refused from here on, not only once this one is up
    except OSError as error:
        listener.close()
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; choose another port (0 takes a free one)"
        ) from None
    return listener


async def _serve(listener: socket.socket, host: str, arguments: dict[str, Any], name: str) -> None:
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve

    port = listener.getsockname()[1]
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    options = _server_options(arguments, host, port, name)
    log(f"loading {arguments['model']} with vLLM on {'GPU' if on_gpu() else 'CPU'}")
    async with _engine(arguments) as engine:
        died = False
        stop = engine.shutdown

        def stop_once(timeout: float | None = None) -> None:
            nonlocal died
            died = died or engine.errored  # from here on it is errored in any case
            engine.shutdown = stop
            stop(timeout)

        engine.shutdown = stop_once
        announcement = asyncio.create_task(_announce(base, name))
        shutdown = await build_and_serve(engine, base, listener, options, log_config=_log_config())
        announcement.cancel()
    await shutdown
    if died:
        raise StageError("the engine died; start the server again (VLLM_LOGGING_LEVEL=INFO shows more)")
    log("stopped")


def _log_config() -> dict[str, Any]:
    """Uvicorn's, with the access log on stderr too: stdout holds the ready line and nothing else."""
    from uvicorn.config import LOGGING_CONFIG

    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


def _server_options(arguments: dict[str, Any], host: str, port: int, name: str) -> Namespace:
    """The options of vLLM's own `serve`, as its parser makes them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", arguments["model"], "--served-model-name", name, "--host", host, "--port", str(port)]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(words)


@contextlib.asynccontextmanager
async def _engine(arguments: dict[str, Any]) -> AsyncIterator[AsyncLLM]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        config = AsyncEngineArgs(**arguments).create_engine_config()
    except ValueError as error:
        raise UserError(f"--source {arguments['model']}: {reason(error)}") from None
    if not on_gpu():
        # The server needs the engine in a process of its own. vLLM starts it afresh on CPU, and it spends most of the
        # start importing again what this process has imported; a fork has it. No thread of torch runs here yet.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        os.register_at_fork(after_in_child=_belong_to_parent)
    try:
        engine = AsyncLLM.from_vllm_config(config)
    except RuntimeError as error:
        raise StageError(f"the engine did not start: {reason(ValueError(error))}") from None
    try:
        yield engine
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)


def _belong_to_parent() -> None:
    """Have the kernel end this process when its parent is gone, even by SIGKILL, so that no engine is left behind."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # where Slurm signals every process of a job: the server stops it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def _announce(base: str, name: str) -> None:
    """Say that the server is ready once /health answers."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{base}/health", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                    if answer.status == 200:
                        print(f"ready {base}/v1 {name}", flush=True)
                        return
            await asyncio.sleep(0.2)
