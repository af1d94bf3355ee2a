"""Internals of vLLM, lm-evaluation-harness and transformers that infer relies on: docs/upstream.md."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from types import SimpleNamespace
from typing import get_args

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.loggers.utils import add_tokenizer_info
from lm_eval.models.api_models import TemplateAPI
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.vllm_causallms import VLLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_arg_string, hash_string, sanitize_model_name
from openai.types.responses import ResponseFunctionToolCallOutputItem, ResponseOutputMessage, ResponseOutputRefusal
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.mpt.modeling_mpt import MptModel
from vllm import AsyncEngineArgs
from vllm.benchmarks import serve as benchmark_client
from vllm.config import ModelConfig
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.config.model import LogprobsMode
from vllm.entrypoints.generate.api_router import init_generate_state
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora import api_router
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX, AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.model_loader.reload import inplace
from vllm.model_executor.models.gpt_oss import GptOssModel
from vllm.platforms.cpu import CpuPlatform
from vllm.renderers.chat_utils import _parse_chat_message_content_mm_part
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from tests.hostile.known import is_known
from tests.upstream import attributes_set, binds, calls, relies_on, says_nothing_of
from tools.infer import served_adapters
from tools.infer.bench import LATENCIES
from tools.infer.engines import vllm_arguments
from tools.infer.rollouts import SAMPLING

ADAPTERS = "tools/infer/adapter_policy_route.py"
BENCH = "tools/infer/bench.py"
DRAIN = "tools/infer/drain.py"
EVALUATE = "tools/infer/evaluate.py"
POLICY = "tools/infer/policy_route.py"
SERVE = "tools/infer/serve.py"
SWAP = "tools/infer/engines/weight_swap.py"
TASKS = "tools/infer/tasks.py"


def test_a_block_of_the_cache_on_a_cpu() -> None:
    relies_on(
        "tools/infer/engines/vllm_arguments.py",
        CpuPlatform.check_and_update_config,
        f"cache_config.block_size = {vllm_arguments._BLOCK}",
    )


def test_workers_are_spawned_by_an_environment_variable() -> None:
    relies_on(SERVE, CpuPlatform.check_and_update_config, "os.environ['VLLM_WORKER_MULTIPROC_METHOD'] = 'spawn'")


def test_a_server_stops_its_engine_by_shutdown() -> None:
    assert isinstance(AsyncLLM.errored, property), SERVE
    binds(SERVE, AsyncLLM.shutdown, None, timeout=1.0)
    calls(SERVE, launcher.serve_http, "partial", "engine_client.shutdown", timeout="timeout")


def test_a_server_is_built_of_an_engine_and_a_socket() -> None:
    binds(SERVE, build_and_serve, None, "base", None, None, log_config={})
    assert inspect.signature(build_and_serve, eval_str=True).return_annotation is asyncio.Task, SERVE
    relies_on(SERVE, build_and_serve, "log_config is not None", "uvicorn_kwargs['log_config'] = log_config")
    relies_on(SERVE, init_generate_state, "args.structured_outputs_config.reasoning_parser")


def test_options_of_a_server_are_its_parsers() -> None:
    words = ["--model", "m", "--served-model-name", "n", "--host", "h", "--port", "1"]
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert (options.model, options.served_model_name, options.host, options.port) == ("m", ["n"], "h", 1), SERVE


def test_a_benchmark_is_a_command_line_and_a_dictionary() -> None:
    binds(BENCH, benchmark_client.main_async, None)
    words = ["--backend", "openai", "--base-url", "http://h:1", "--model", "m", "--tokenizer", "t", "--dataset-name"]
    words += ["random", "--random-input-len", "1", "--random-output-len", "2", "--num-prompts", "3", "--seed", "4"]
    words += ["--max-concurrency", "5", "--num-warmups", "5", "--temperature", "0", "--metric-percentiles", "50,99"]
    words += ["--percentile-metrics", ",".join(LATENCIES), "--extra-body", "{}", "--header", "a=b"]
    parser = FlexibleArgumentParser()
    benchmark_client.add_cli_args(parser)
    asked = parser.parse_args([*words, "--save-detailed", "--disable-tqdm"])
    assert (asked.random_input_len, asked.num_prompts, asked.seed, asked.extra_body) == (1, 3, 4, {}), BENCH
    relies_on(
        BENCH,
        benchmark_client.benchmark,
        'result[f"mean_{metric_attribute_name}_ms"] = mean',
        'result[f"p{p_word}_{metric_attribute_name}_ms"] = value',
    )
    relies_on(BENCH, benchmark_client.main_async, "args.header", "return result_json", "args.ignore_eos = True")


def test_the_server_is_in_the_state_of_its_application() -> None:
    relies_on(
        DRAIN,
        launcher.serve_http,
        "app.state.server = server",
        "server = NoSignalServer(config, peer_loads=peer_loads)",
    )
    relies_on(DRAIN, init_entrypoints_middleware, "args.middleware", "app.add_middleware(imported)")
    assert {"started", "should_exit", "force_exit"} <= attributes_set(uvicorn.Server.__init__), DRAIN
    relies_on(DRAIN, uvicorn.Server.shutdown, "self.config.timeout_graceful_shutdown", "server.close()")


def test_a_router_is_added_when_the_application_starts() -> None:
    """Its lifespan begins inside the middlewares; what is included then is routed and guarded as vLLM's own."""
    seen = []
    app = FastAPI()

    class Middleware:
        def __init__(self, inner) -> None:
            self.inner = inner

        async def __call__(self, scope, receive, send) -> None:
            if scope["type"] == "lifespan":
                router = APIRouter()
                router.get("/v1/ours")(lambda: seen.append(scope["app"]))
                scope["app"].include_router(router)
            await self.inner(scope, receive, send)

    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    app.add_middleware(Middleware)
    with TestClient(app) as client:
        assert client.get("/v1/ours").status_code == 401, DRAIN
        assert client.get("/v1/ours", headers={"Authorization": "Bearer key"}).status_code == 200, DRAIN
    assert seen == [app], DRAIN


def test_keys_guard_the_paths_below_v1() -> None:
    assert "/v1" in GUARDED_PREFIX, POLICY
    relies_on(POLICY, init_entrypoints_middleware, "app.add_middleware(AuthenticationMiddleware, tokens=tokens)")


def test_weights_are_reloaded_from_an_iterator() -> None:
    calls(SWAP, Worker.reload_weights, "self.model_runner.reload_weights", "*args")
    binds(SWAP, GPUModelRunner.reload_weights, None, weights_iterator=iter(()))
    relies_on(SWAP, GPUModelRunner.reload_weights, "self.reset_lora_state()", "self.reset_encoder_cache()")
    says_nothing_of(POLICY, GPUModelRunner.reload_weights, "reset_prefix_cache")
    relies_on(SWAP, inplace.reload_weights, "loaded_weights = model.load_weights(weights_iterator)")


def test_experts_of_gpt_oss_are_written_past_the_reload() -> None:
    relies_on("tools/infer/engines/vllm_support.py", GptOssModel._load_weights_other, "param.copy_(narrow_weight)")


def test_generation_is_paused_for_an_exchange() -> None:
    binds(POLICY, AsyncLLM.pause_generation, None, mode="wait", clear_cache=True)
    binds(POLICY, AsyncLLM.reset_prefix_cache, None, reset_running_requests=True)
    binds(POLICY, AsyncLLM.update_weight_version, None, "version")
    binds(POLICY, AsyncLLM.get_weight_version, None)
    binds(POLICY, AsyncLLM.resume_generation, None)


def test_sampling_has_two_switches() -> None:
    for name, value in SAMPLING.items():
        binds("tools/infer/rollouts.py", AsyncEngineArgs, **{name: value})
    assert "processed_logprobs" in get_args(LogprobsMode), "tools/infer/rollouts.py"
    relies_on("tools/infer/rollouts.py", ModelConfig.get_diff_sampling_param, "src == 'vllm'")


def test_an_adapter_is_checked_by_its_configuration() -> None:
    ours = "tools/infer/served_adapters.py"
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["a"], "rank_pattern": {"a": 2}, "other": 1}
    helper = PEFTHelper.from_dict(fields)
    assert (helper.get_rank_and_scaling("x.a"), helper.get_rank_and_scaling("x.b")) == ((2, 4.0), (4, 2.0)), ours
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    with pytest.raises(ValueError, match="DoRA"):
        PEFTHelper.from_dict(fields | {"use_dora": True}).validate_legal(LoRAConfig(max_lora_rank=8))
    assert {*served_adapters._RANKS} <= {*get_args(MaxLoRARanks)}, ours


def test_adapters_are_loaded_by_the_models_of_a_server() -> None:
    ours = "tools/infer/adapter_route.py"
    binds(ours, OpenAIServingModels.load_lora_adapter, None, LoadLoRAAdapterRequest(lora_name="a", lora_path="b"))
    binds(ours, OpenAIServingModels.unload_lora_adapter, None, UnloadLoRAAdapterRequest(lora_name="a"))
    for method in (OpenAIServingModels.load_lora_adapter, OpenAIServingModels.unload_lora_adapter):
        assert inspect.signature(method).return_annotation == ErrorResponse | str, ours
    relies_on(ours, init_app_state, "await state.openai_serving_models.init_static_loras()")
    relies_on(ours, api_router.attach_router, "not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING")


def test_an_adapter_is_unloaded_by_name_and_by_number() -> None:
    relies_on(ADAPTERS, OpenAIServingModels.unload_lora_adapter, "del self.lora_requests[lora_name]")
    says_nothing_of(ADAPTERS, OpenAIServingModels.unload_lora_adapter, "remove_lora")
    binds(ADAPTERS, AsyncLLM.remove_lora, None, 1)
    binds(ADAPTERS, LoRARequest, lora_name="a", lora_int_id=1, lora_path="b")


def test_a_late_request_reads_its_own_adapter() -> None:
    relies_on(ADAPTERS, LRUCacheWorkerLoRAManager._apply_adapters, "self.add_adapter(lora)")
    relies_on(ADAPTERS, LRUCacheWorkerLoRAManager.add_adapter, "lora = self._load_adapter(lora_request)")
    key = "return [('lora', lora_request.lora_name, lora_request.lora_path)]"
    relies_on(ADAPTERS, _gen_lora_extra_hash_keys, key)


def test_a_task_file_is_loaded_with_what_it_includes(tmp_path) -> None:
    (tmp_path / "functions.py").write_text("def words(doc): return doc\n")
    (tmp_path / "common.yaml").write_text("output_type: loglikelihood\ntask: other\n")
    (tmp_path / "task.yaml").write_text("include: common.yaml\ntask: own\ndoc_to_text: !function functions.words\n")
    config = load_yaml(tmp_path / "task.yaml")
    assert (config["task"], config["output_type"], config["doc_to_text"](1)) == ("own", "loglikelihood", 1), TASKS


def test_tasks_are_indexed_by_name() -> None:
    manager = TaskManager(include_defaults=False)
    assert (dict(manager.task_index), list(manager.all_tasks)) == ({}, []), TASKS
    assert "yaml_path" in Entry.__dataclass_fields__, TASKS
    binds(EVALUATE, manager.load, [{}])


def test_tasks_are_added_to_the_index(tmp_path) -> None:
    manager = TaskManager(include_defaults=False)
    config = {
        "task": "own",
        "output_type": "loglikelihood",
        "dataset_path": "json",
        "doc_to_text": "",
        "doc_to_target": "",
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    config |= {"dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    manager.task_index["own"] = Entry(name="own", kind=Kind.TASK, yaml_path=None, cfg=config)
    manager.task_index["all"] = Entry(
        name="all", kind=Kind.GROUP, yaml_path=None, cfg={"group": "all", "task": ["own"]}
    )
    manager.task_index["tag"] = Entry(name="tag", kind=Kind.TAG, yaml_path=None, tags={"own"})
    assert list(manager.load(["all"])["tasks"]) == list(manager.load(["tag"])["tasks"]) == ["own"], TASKS


@pytest.mark.parametrize("model", [HFLM, VLLM])
def test_token_ids_are_scored(model) -> None:
    binds("tools/infer/engines/scoring.py", model._loglikelihood_tokens, None, [], disable_tqdm=True)
    relies_on(
        "tools/infer/engines/scoring.py",
        TemplateLM.loglikelihood,
        "self._loglikelihood_tokens(new_reqs, disable_tqdm=disable_tqdm)",
    )


def test_tasks_are_prepared_for_an_evaluation() -> None:
    relies_on(
        EVALUATE,
        evaluator.simple_evaluate,
        "(default_num_fewshot := task_obj.get_config('num_fewshot')) is None",
        "task_obj.set_config(key='num_fewshot', value=0)",
        "task_obj.set_fewshot_seed(seed=fewshot_random_seed)",
        "random.seed(random_seed)",
    )
    binds(EVALUATE, evaluator.evaluate, None, None, limit=1, apply_chat_template=False, bootstrap_iters=1,
          fewshot_as_multiturn=True)  # fmt: skip


def test_windows_of_long_texts() -> None:
    ours = "tools/infer/engines/transformers.py"
    calls(ours, VLLM.loglikelihood_rolling, "get_rolling_token_windows", max_seq_len="self.max_length - 2")
    calls(ours, HFLM.loglikelihood_rolling, "utils.get_rolling_token_windows", max_seq_len="self.max_length")


def test_a_class_for_servers_tokenizes_as_that_for_vllm() -> None:
    ours = "tools/infer/engines/server.py"
    binds(ours, VLLM.tok_encode, None, "text", add_special_tokens=None)
    binds(ours, VLLM.modify_gen_kwargs, {}, eos="e", default_max_gen_toks=2)
    binds(ours, LocalCompletionsAPI._create_payload, None, [[1]], generate=False, seed=1, eos="e")
    names = {name for name in VLLM.tok_encode.__code__.co_names if name.startswith(("add_bos", "prefix_token"))}
    assert names == {"add_bos_token", "prefix_token_id"}, (
        f"re-read {ours}: other fields than those of LocalCompletionsAPI"
    )
    source = inspect.getsource(TemplateAPI)
    for line in (
        "max_context_len = self.max_length - max_gen_toks",
        "inp = (context_enc + continuation_enc)[-self.max_length :]",
        "max_seq_len=self.max_length - 1,",
        "self.max_length = max_length - 1",
    ):
        assert line in source, f"re-read {ours}: {line}"


def test_a_record_is_made_of_the_harness_functions() -> None:
    assert (DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED) == (0, 1234), "README of infer says so"
    found: dict[str, object] = {}
    add_tokenizer_info(found, SimpleNamespace(tokenizer=None))
    assert handle_arg_string("true") is True
    assert handle_arg_string("0.5") == 0.5
    assert hash_string("a") == hashlib.sha256(b"a").hexdigest()
    assert "/" not in sanitize_model_name("a/b")


def test_fields_that_are_none_come_from_the_models_own_configuration() -> None:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config = GenerationConfig(repetition_penalty=3.0)
    assert model._prepare_generation_config(GenerationConfig())[0].repetition_penalty == 3.0
    model.generation_config = GenerationConfig()
    plain = model._prepare_generation_config(GenerationConfig(max_new_tokens=2))[0]
    assert plain.repetition_penalty in (None, 1.0), "re-read _complete of tools/infer/engines/transformers.py"


def test_mpt_makes_its_alibi_in_a_method() -> None:
    ours = "shared/families/common/transformers_workarounds.py"
    calls(ours, MptModel.forward, "self.build_mpt_alibi_tensor", "self.num_heads", "self.config.max_seq_len")
    binds(ours, MptModel.build_mpt_alibi_tensor, None, 2, 4, alibi_bias_max=8, device=None)


def test_the_server_of_vllm_alone_answers_501_for_apis_of_other_models() -> None:
    """vLLM's own application without a model of such an API: the answer that tests/hostile/known.py takes for vLLM's own."""
    app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m"]), ("generate",))
    app.state.enable_server_load_tracking = False
    answer = TestClient(app, raise_server_exceptions=False).post("/v1/systemone", json={"state": "x", "questions": {}})
    assert answer.status_code == 501
    assert is_known({"status": 501, "path": "/v1/systemone", "said": answer.text})


@pytest.mark.parametrize("content", [[], [ResponseOutputRefusal(refusal="", type="refusal")]])
def test_an_earlier_reply_without_text_is_an_error_of_vllm(content) -> None:
    earlier = ResponseOutputMessage(id="", content=content, role="assistant", status="completed", type="message")
    with pytest.raises((IndexError, AttributeError)) as caught:
        construct_input_messages(request_instructions=None, request_input=[earlier])
    assert is_known({"status": 500, "path": "/v1/responses", "said": str(caught.value)})


def test_a_tools_output_in_parts_is_an_error_of_vllm() -> None:
    part = {"type": "input_text", "text": "fox"}
    item = {"type": "function_call_output", "id": "", "call_id": None, "output": [part], "status": "completed"}
    (message,) = construct_input_messages(
        request_instructions=None,
        request_input=[ResponseFunctionToolCallOutputItem.model_validate(item | {"call_id": "c"})],
    )
    with pytest.raises(AssertionError) as caught:
        _parse_chat_message_content_mm_part(message["content"][0])
    said = f'"message":"{caught.value}","type":"InternalServerError"'
    row = {"status": 500, "path": "/v1/responses", "said": said, "body": json.dumps({"input": [item]})}
    assert is_known(row) == "tool output in parts"
    assert not is_known(row | {"body": json.dumps({"input": "fox"})})
