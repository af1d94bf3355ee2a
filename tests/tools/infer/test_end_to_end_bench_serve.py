"""tests/benchmarks/bench_serve.py compares two servers with one engine."""

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.benchmarks.bench_serve import commands
from tools.infer.engines import vllm_arguments
from tools.infer.engines.engine import EngineSettings


def test_the_bare_server_has_infers_engine(models) -> None:
    ours = vllm_arguments.engine_arguments(models("llama"), EngineSettings())
    words = commands(models("llama"), 8000)["vllm"]
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])
    assert options.model_tag == ours.pop("model")
    del ours["use_tqdm_on_load"]  # a progress bar
    assert {name: getattr(options, name) for name in ours} == ours
