"""`infer serve`: vLLM's OpenAI server for a Hugging Face directory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
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
from shared.runtime.parent_death import die_with_parent
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.vllm import announce, checked_arguments
from tools.infer.engines.vllm_support import reason, refusals
from tools.infer.environment import on_gpu, prepare_environment
from tools.infer.prompts import load_tokenizer
from tools.infer.source import open_hf_directory

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


def run(source: Path, *, host: str, port: int, served_model_name: str | None, settings: EngineSettings) -> None:
    """Serve until a signal: SIGTERM and SIGINT exit with code 0, SIGUSR1 raises Interrupted.

    UserError for an unsupported model or an invalid address, StageError if the engine dies.
    """
    signal.signal(signal.SIGTERM, _leave)  # exit code 0, also while the model loads
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGUSR1, _leave_for_now)
    with bind(host, port) as listener:
        prepare_environment()
        model = open_hf_directory(source)
        arguments, _ = checked_arguments(model, settings)
        load_tokenizer(model)  # checked early; vLLM loads it late in its start
        name = served_model_name or source.resolve().name
        import uvloop

        uvloop.run(_serve(listener, host, arguments, name))
    if _exit_code == EXIT_INTERRUPTED:
        raise Interrupted("the time was up; the same command serves again")


_exit_code = EXIT_DONE  # after a signal


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_exit_code)


def _leave_for_now(signum: int, frame: FrameType | None) -> None:
    """SIGUSR1, Slurm's warning before the time limit: stop with the exit code for a restart."""
    global _exit_code
    _exit_code = EXIT_INTERRUPTED
    os.kill(os.getpid(), signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model loads. UserError if the address is invalid or in use."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)  # reserves the port while the model loads
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
    announce(arguments)
    async with _engine(arguments, listener) as engine:
        died = False
        stop = engine.shutdown

        def stop_once(timeout: float | None = None) -> None:
            nonlocal died
            died = died or engine.errored  # read before `stop`, which sets it
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
    """Uvicorn's logging configuration, access log on stderr; stdout has only the ready line."""
    from uvicorn.config import LOGGING_CONFIG

    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


def _server_options(arguments: dict[str, Any], host: str, port: int, name: str) -> Namespace:
    """Options of `vllm serve`, from vLLM's parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = ["--model", arguments["model"], "--served-model-name", name, "--host", host, "--port", str(port)]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(words)


@contextlib.asynccontextmanager
async def _engine(arguments: dict[str, Any], listener: socket.socket) -> AsyncIterator[AsyncLLM]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    with refusals(arguments["model"]):
        config = AsyncEngineArgs(**arguments).create_engine_config()
    if not on_gpu():
        # The engine is a separate process, by default spawned. Most of its start-up time is imports; a fork shares those of
        # this process. A fork is safe here: no torch thread runs yet.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        os.register_at_fork(after_in_child=_die_with_parent)
        # The engine must not hold the port: vLLM, at its end, looks up the command line of another holder, and fails with
        # `ZombieProcess` where the engine has just ended.
        os.register_at_fork(after_in_child=listener.close)
    try:
        engine = AsyncLLM.from_vllm_config(config)
    except RuntimeError as error:
        raise StageError(f"the engine did not start: {reason(ValueError(error))}") from None
    try:
        yield engine
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)


def _die_with_parent() -> None:
    """Have the kernel kill the engine when the server dies, even by SIGKILL."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm may send it to all processes; the server stops the engine
    die_with_parent()


async def _announce(base: str, name: str) -> None:
    """Print the ready line once /health answers."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{base}/health", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                    if answer.status == 200:
                        print(f"ready {base}/v1 {name}", flush=True)
                        return
            await asyncio.sleep(0.2)
