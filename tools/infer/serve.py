"""`infer serve`: vLLM's OpenAI server for a Hugging Face directory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import signal
import socket
import tempfile
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from shared.checkpoint.formats.weights_digest import weights_digest
from shared.cli import log
from shared.errors import EXIT_DONE, EXIT_INTERRUPTED, Interrupted, StageError, UserError
from shared.runtime.parent_death import die_with_parent
from tools.infer.api_keys import api_keys
from tools.infer.drain import InFlight, drain, started
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.vllm import announce, checked_arguments
from tools.infer.engines.vllm_flags import parse
from tools.infer.engines.vllm_support import check_exchange, check_lora, fused_without_adapters, reason, refusals
from tools.infer.engines.weight_swap import WeightSwap
from tools.infer.environment import on_gpu, prepare_environment
from tools.infer.policy_adapters import VERSIONS, PolicyAdapters
from tools.infer.prompts import load_tokenizer
from tools.infer.served_adapters import check_adapter, lora_arguments, parse_adapters
from tools.infer.source import open_hf_directory
from tools.infer.weight_check import ServedWeights

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from tools.infer.policy_route import PolicyRoute


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The server around the engine."""

    host: str
    port: int
    served_model_name: str | None = None  # None: the directory's
    api_key_file: Path | None = None  # a key a line
    chat_template: Path | None = None  # None: the tokenizer's
    gpu_memory: float | None = None  # share of each GPU's; None: vLLM's default
    drain: int = 60  # seconds for requests in flight after SIGTERM
    vllm_flags: tuple[str, ...] = ()  # words of vLLM's own command line
    adapters: tuple[str, ...] = ()  # NAME=DIR of LoRA adapters
    lora_rank: int | None = None  # the largest of adapters loaded later; None: that of `adapters`
    weights_below: Path | None = None  # directories below it may replace the weights; None: no directory
    broadcasts: bool = False  # a trainer's broadcast may replace the weights
    policy_adapters: bool = False  # adapters below `weights_below` are the policy, and the weights stay
    weights_flag: str = "--reload-from"  # the flag of one of them, for messages
    engine: Mapping[str, Any] = field(default_factory=dict)  # further arguments of vLLM, not to be changed by its flags

    @property
    def exchanges(self) -> bool:
        """Whether the weights may be replaced."""
        return not self.policy_adapters and (self.weights_below is not None or self.broadcasts)

    @property
    def later_adapters(self) -> int:
        """How many adapters that are loaded at run time may be in one batch."""
        return VERSIONS if self.policy_adapters else int(self.weights_below is not None)


def run(source: Path, *, server: ServerSettings, settings: EngineSettings) -> None:
    """Serve until a signal: SIGTERM and SIGINT exit with code 0, SIGUSR1 raises Interrupted.

    UserError for an unsupported model, an invalid address or flag of vLLM; StageError if the engine dies.
    """
    signal.signal(signal.SIGTERM, _leave)  # exit code 0, also while the model loads
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGUSR1, _leave_for_now)
    keys = api_keys(server.api_key_file) if server.api_key_file else ()
    with bind(server.host, server.port) as listener:
        prepare_environment()
        flags = parse(server.vllm_flags)
        if server.gpu_memory is not None:
            if not on_gpu():
                raise UserError("--gpu-memory: this machine has no GPU; leave it out")
            flags.engine["gpu_memory_utilization"] = server.gpu_memory
        own_arguments = dict(server.engine)
        name = server.served_model_name or source.resolve().name
        if server.exchanges:
            own_arguments["worker_extension_cls"] = WeightSwap.path
        model = open_hf_directory(source)
        served = ServedWeights.read(model)
        adapters = parse_adapters(server.adapters, served.shapes, name)
        if server.lora_rank and server.weights_below is None:
            raise UserError(
                "--lora-rank is for adapters that are loaded later: give --reload-from, too, or leave it out"
            )
        if adapters and "lora_modules" in flags.frontend:
            raise UserError("after --: --lora-modules is infer's --adapter; give it before --")
        if adapters or server.lora_rank:
            own_arguments |= lora_arguments(adapters, server.lora_rank, served.shapes, later=server.later_adapters)
        if taken := own_arguments.keys() & flags.engine.keys():
            flag = f"--{taken.pop().replace('_', '-')}"
            raise UserError(f"after --: {flag} is set by infer itself here; leave it out")
        arguments, _ = checked_arguments(model, settings, flags.engine | own_arguments)
        if adapters or server.lora_rank:
            check_lora(model, "--adapter" if adapters else "--lora-rank")
        if not {"tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code"} & flags.engine.keys():
            load_tokenizer(model)  # checked early; vLLM loads it late in its start
        port = listener.getsockname()[1]
        own = ["--model", arguments["model"], "--served-model-name", name]
        own += ["--host", server.host, "--port", str(port), "--middleware", InFlight.path]
        if server.chat_template:
            own += ["--chat-template", str(server.chat_template)]
        if adapters:
            named = (json.dumps({"name": adapter.name, "path": str(adapter.path)}) for adapter in adapters)
            own += ["--lora-modules", *named]
        options = flags.options(*own)
        options.api_key = keys or None  # not in `own`: an error would print it
        import uvloop

        taken_as_policy = policy_adapters(model, served, arguments) if server.policy_adapters else None
        uvloop.run(_serve(listener, arguments, options, server, served, taken_as_policy))
    if _exit_code == EXIT_INTERRUPTED:
        raise Interrupted("the time was up; the same command serves again")


def policy_adapters(model: Path, served: ServedWeights, arguments: Mapping[str, Any]) -> PolicyAdapters:
    """Which adapters a server with vLLM's `arguments` takes as its policy."""
    rank, modules = arguments["max_lora_rank"], arguments.get("lora_target_modules")
    log(f"room for adapters of rank {rank}{f' of {", ".join(modules)}' if modules else ''}; reading their base")
    return PolicyAdapters(
        base=weights_digest(model),
        shapes=served.shapes,
        rank=rank,
        modules=modules,
        fused=fused_without_adapters(model),
    )


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


async def _serve(
    listener: socket.socket,
    arguments: dict[str, Any],
    options: Namespace,
    server: ServerSettings,
    served: ServedWeights,
    adapters: PolicyAdapters | None,
) -> None:
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve

    scheme = "https" if options.ssl_certfile else "http"
    base = f"{scheme}://{f'[{options.host}]' if ':' in options.host else options.host}:{options.port}"
    announce(arguments)
    exchange = server.weights_flag if server.exchanges else None
    policy: PolicyRoute | None = None
    async with _engine(arguments, options, listener, exchange) as engine, contextlib.AsyncExitStack() as folders:
        if adapters is not None:
            from tools.infer.adapter_policy_route import AdapterPolicyRoute

            assert server.weights_below is not None, "checked with the flags"
            copies = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="baton-infer-policies-")))
            name = options.served_model_name[0]
            by_adapter = AdapterPolicyRoute(
                adapters, server.weights_below, engine, source=served.directory, name=name, copies=copies
            )
            InFlight.routers = (by_adapter.router,)
        if server.exchanges:
            from tools.infer.adapter_route import AdapterRoute
            from tools.infer.policy_route import PolicyRoute

            policy = PolicyRoute(served, server.weights_below, engine, broadcasts=server.broadcasts)
            InFlight.routers = (policy.router,)
            if arguments.get("enable_lora") and server.weights_below is not None:
                check = partial(
                    check_adapter,
                    shapes=served.shapes,
                    place="adapter",
                    rank=arguments["max_lora_rank"],
                    modules=arguments.get("lora_target_modules"),
                )
                InFlight.routers += (AdapterRoute(server.weights_below, check).router,)
        died = False
        stop = engine.shutdown

        def stop_once(timeout: float | None = None) -> None:
            nonlocal died
            died = died or engine.errored  # read before `stop`, which sets it
            engine.shutdown = stop
            stop(timeout)

        engine.shutdown = stop_once
        announcement = asyncio.create_task(_announce(base, options.served_model_name[0], server.drain))
        # `timeout_graceful_shutdown` is uvicorn's, which stops when vLLM does not stop it: on SIGTERM after the start
        shutdown = await build_and_serve(
            engine, base, listener, options, log_config=_log_config(), timeout_graceful_shutdown=server.drain
        )
        announcement.cancel()
        if InFlight.cut_off:
            log(f"requests cut off: {InFlight.cut_off}")
    await shutdown
    if policy is not None and policy.failed is not None:
        raise StageError(f"the weights could not be exchanged: {policy.failed}; start the server again")
    if died:
        raise StageError("the engine died; start the server again (VLLM_LOGGING_LEVEL=INFO shows more)")
    log("stopped")


def _log_config() -> dict[str, Any]:
    """Uvicorn's logging configuration, access log on stderr; stdout has only the ready line."""
    from uvicorn.config import LOGGING_CONFIG

    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


@contextlib.asynccontextmanager
async def _engine(
    arguments: dict[str, Any], options: Namespace, listener: socket.socket, exchange: str | None
) -> AsyncIterator[AsyncLLM]:
    """The engine. `exchange`: the flag by which its weights may be replaced; UserError if they cannot be."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    usage = UsageContext.OPENAI_API_SERVER  # its defaults are those of `vllm serve`: sequences and tokens of a batch
    with refusals(arguments["model"]):
        engine_arguments = AsyncEngineArgs(**arguments, enable_log_requests=options.enable_log_requests)
        config = engine_arguments.create_engine_config(usage)
    # The server reads the reasoning parser here, too: that of a flag, or the model's own (gpt-oss), which the engine finds.
    options.structured_outputs_config = config.structured_outputs_config
    if exchange is not None:
        check_exchange(config, exchange)
    if not on_gpu():
        if config.lora_config is not None:
            from tools.infer.engines import lora_on_cpu

            lora_on_cpu.install()  # the engine is a fork of this process
        # The engine is a separate process, by default spawned. Most of its start-up time is imports; a fork shares those of
        # this process. A fork is safe here: no torch thread runs yet.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        os.register_at_fork(after_in_child=_die_with_parent)
        # The engine must not hold the port: vLLM, at its end, looks up the command line of another holder, and fails with
        # `ZombieProcess` where the engine has just ended.
        os.register_at_fork(after_in_child=listener.close)
    try:
        engine = AsyncLLM.from_vllm_config(
            config,
            usage_context=usage,
            enable_log_requests=options.enable_log_requests,
            aggregate_engine_logging=engine_arguments.aggregate_engine_logging,
            disable_log_stats=engine_arguments.disable_log_stats,
        )
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


async def _announce(base: str, name: str, seconds: int) -> None:
    """Print the ready line once connections are accepted. From then on a signal lets requests in flight finish."""
    server = await started()

    def stop_for_now() -> None:
        global _exit_code
        _exit_code = EXIT_INTERRUPTED
        drain(server, seconds)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, drain, server, seconds)
    loop.add_signal_handler(signal.SIGUSR1, stop_for_now)
    print(f"ready {base}/v1 {name}", flush=True)
