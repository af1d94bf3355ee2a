"""Flags of `vllm serve`, given to `infer serve` after `--`: parsed by vLLM's own parser, before anything is loaded."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

from shared.cli import nearest
from shared.errors import UserError

if TYPE_CHECKING:
    from argparse import ArgumentParser

# What `infer serve` decides itself -> its flag.
_OURS = {
    "model": "--source",
    "served_model_name": "--served-model-name",
    "host": "--host",
    "port": "--port",
    "dtype": "--precision",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--batch-size",
    "tensor_parallel_size": "--tensor-parallel",
    "gpu_memory_utilization": "--gpu-memory",
    "chat_template": "--chat-template",
    "api_key": "--api-key-file",
    "shutdown_timeout": "--drain",
}
# Several servers, or none on a TCP port: `infer serve` is one server on one port.
_OTHER_SERVERS = {
    *("uds", "headless", "api_server_count", "grpc", "grpc_port"),
    *("data_parallel_multi_port_external_lb", "data_parallel_external_lb", "data_parallel_hybrid_lb"),
}


@dataclass(frozen=True, kw_only=True)
class VllmFlags:
    """What the words after `--` set.

    Attributes:
        words: as given.
        engine: the arguments of `vllm.EngineArgs` among them.
        frontend: further ones, of the server alone.
    """

    words: tuple[str, ...]
    engine: dict[str, Any]
    frontend: dict[str, Any]

    def options(self, *own: str) -> Namespace:
        """All options of vLLM's server, with the words `own` before these. UserError for values that exclude each other."""
        from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
        from vllm.entrypoints.launchers.launcher import validate_api_server_args
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        options = _parser().parse_args([*own, *self.words])
        try:
            validate_parsed_serve_args(options)
            if options.tool_parser_plugin:
                ToolParserManager.import_tool_parser(options.tool_parser_plugin)
            if options.reasoning_parser_plugin:
                ReasoningParserManager.import_reasoning_parser(options.reasoning_parser_plugin)
            if options.reasoning_parser:  # vLLM's engine does it, later
                options.structured_outputs_config.reasoning_parser = options.reasoning_parser
            validate_api_server_args(options)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"after --: {str(error.args[0]).removeprefix('Error: ')}") from None
        return options


def parse(words: Sequence[str]) -> VllmFlags:
    """The flags of `words`. UserError for one that vLLM does not have, or that `infer serve` has itself."""
    from vllm import EngineArgs

    parser = _parser()
    for action in parser._actions:
        action.default = SUPPRESS  # what is left are the flags that are given
    given = vars(parser.parse_args(list(words)))
    if "model_tag" in given:
        raise UserError(f"after --: {given['model_tag']!r} follows no flag; the model is --source")
    for name in given:
        flag = "--" + name.replace("_", "-")
        if name in _OURS:
            raise UserError(f"after --: {flag} is infer's {_OURS[name]}; give it before --")
        if name in _OTHER_SERVERS:
            raise UserError(f"after --: {flag} is for other servers than one on a port; run `vllm serve` for it")
    of_engine = {field.name for field in fields(EngineArgs)}
    return VllmFlags(
        words=tuple(words),
        engine={name: value for name, value in given.items() if name in of_engine},
        frontend={name: value for name, value in given.items() if name not in of_engine},
    )


def _parser() -> ArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            what, _, rest = message.partition("unrecognized arguments: ")
            if rest:
                flag = rest.split()[0].partition("=")[0]
                known = [name for name in self._option_string_actions if name.startswith("--")]
                raise UserError(f"after --: vLLM has no flag {flag}{nearest(flag, known)}")
            raise UserError(f"after --: {what}")

    return make_arg_parser(Parser(prog="infer serve ... --", allow_abbrev=False))
