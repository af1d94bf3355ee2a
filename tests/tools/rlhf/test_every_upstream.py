"""Internals of DeepSpeed, TRL, transformers and trlx that rlhf relies on: docs/upstream.md."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import deepspeed.ops
import pytest
from datasets import Dataset
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
    core_model_loading,
)
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer import grpo_trainer

from tests.trlx_checkout import needs_trlx
from tests.upstream import calls, relies_on
from tools.rlhf.engines import trl, trlx_package
from tools.rlhf.engines.preference_trainers import OwnTokensDPOTrainer, OwnTokensKTOTrainer

DEEPSPEED = "tools/rlhf/engines/deepspeed.py"
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}


def test_an_op_among_the_compatible_ones_is_built() -> None:
    relies_on(
        DEEPSPEED,
        build_shm_op,
        "builder = get_accelerator().create_op_builder('ShareMemCommBuilder')",
        "builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False)",
    )
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm", DEEPSPEED
    relies_on(DEEPSPEED, deepspeed.ops, "globals()['__compatible_ops__'] = _probe_compatible_ops()")


def test_a_partitioned_parameter_has_an_id() -> None:
    relies_on(DEEPSPEED, Init._convert_to_deepspeed_param, "param.ds_id = Init.param_id")
    relies_on(DEEPSPEED, deepspeed.zero.GatheredParameters.__init__, "hasattr(p, 'ds_id')")


def test_every_optimizer_has_groups() -> None:
    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer, FP16_Optimizer):
        assert isinstance(kind.param_groups, property), f"{kind.__name__}: re-read set_learning_rate of {DEEPSPEED}"


GROUPS = pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])


@GROUPS
def test_replies_are_sampled_once_a_period(kind: type) -> None:
    relies_on(
        "tools/rlhf/algorithms/group_training.py",
        kind._prepare_inputs,
        "generate_every = self.args.steps_per_generation * self.num_iterations",
        "self._step % generate_every == 0 or self._buffered_inputs is None",
    )


@GROUPS
def test_a_reward_is_named_by_its_function(kind: type) -> None:
    def function() -> None: ...

    function.__name__ = "length"
    assert grpo_trainer.get_callable_name(function) == "length", "tools/rlhf/algorithms/group_training.py"
    calls("tools/rlhf/algorithms/group_training.py", kind.__init__, "get_callable_name", "reward_funcs[i]")


def test_a_checkpoint_is_on_disk_when_callbacks_hear_of_it() -> None:
    assert f"{PREFIX_CHECKPOINT_DIR}-" == trl._CHECKPOINT
    relies_on(
        "tools/rlhf/engines/trl.py",
        Trainer._maybe_log_save_evaluate,
        "if self.control.should_save:\n    self._save_checkpoint(model, trial)\n"
        "    self.control = self.callback_handler.on_save(self.args, self.state, self.control)",
    )


def test_given_processors_come_before_the_temperature() -> None:
    class Ours:
        """A processor."""

    model = LlamaForCausalLM(LlamaConfig(**TINY))
    settings = GenerationConfig(do_sample=True, temperature=0.5, top_k=0, max_new_tokens=1)
    settings, _ = model._prepare_generation_config(settings)
    ours = Ours()
    found = model._get_logits_processor(settings, input_ids_seq_length=1, logits_processor=[ours])
    assert found[0] is ours, "re-read _SampledLogProbs of tools/rlhf/rollout/in_process.py"
    assert [type(each).__name__ for each in found[1:]] == ["TemperatureLogitsWarper"]
    assert "logits_processor" in inspect.signature(GenerationMixin.generate).parameters


def test_the_head_of_a_reward_model_is_its_score() -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1))
    assert isinstance(model.score, nn.Linear), "re-read load_critic of tools/rlhf/models.py"
    assert model.base_model is model.model


def test_a_tensor_that_a_class_holds_is_read_by_an_index() -> None:
    relies_on("shared/weight_account.py", core_model_loading._materialize_copy, "tensor = tensor[...]")
    relies_on(
        "shared/weight_account.py",
        core_model_loading.convert_and_load_state_dict_in_model,
        "renamed_key in meta_model_state_dict",
    )


def test_a_model_knows_its_tied_and_its_ignored_names() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}, "shared/weight_account.py"
    assert isinstance(model._keys_to_ignore_on_load_unexpected, set), "shared/weight_account.py"


def test_saving_removes_tied_tensors_then_renames() -> None:
    relies_on(
        "tools/rlhf/published_directory.py",
        PreTrainedModel.save_pretrained,
        "state_dict = remove_tied_weights_from_state_dict(state_dict, model_to_save)",
        "state_dict = revert_weight_conversion(model_to_save, state_dict)",
    )


@GROUPS
def test_prompts_are_tokenised_in_a_method(kind: type) -> None:
    relies_on(
        "tools/rlhf/algorithms/group_training.py",
        kind._generate,
        "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)",
    )


@GROUPS
def test_replies_are_sampled_and_scored_in_these_methods(kind: type) -> None:
    place = "tools/rlhf/engines/group_trainers.py"
    calls(place, kind._generate_single_turn, "unwrapped_model.generate")
    calls(place, kind._generate, "self._generate_single_turn")
    relies_on(
        place,
        kind._prepare_inputs,
        "generation_batch = self._generate_and_score_completions(generation_batch)",
    )
    calls(place, kind._compute_loss, "self._get_per_token_logps_and_entropies")
    named = list(inspect.signature(kind._get_per_token_logps_and_entropies).parameters)
    assert named[1:6] == ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"], place
    relies_on(place, kind.log, "self._metrics[mode].items()")


def test_the_loss_takes_weights_of_tokens() -> None:
    place = "tools/rlhf/engines/group_trainers.py"
    relies_on(
        place,
        GRPOTrainer._compute_loss,
        "advantages.dim() == 1",
        'mask = completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]',
        "attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)",
        'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
    )


PREFERENCES = "tools/rlhf/engines/preference_trainers.py"
PREFERENCE_TRAINERS = (OwnTokensDPOTrainer, OwnTokensKTOTrainer)


@pytest.mark.parametrize("kind", PREFERENCE_TRAINERS)
def test_preference_trainers_take_rows_as_they_are(kind: type) -> None:
    theirs = kind.__mro__[2]
    calls(PREFERENCES, theirs.__init__, "self._prepare_dataset")


@pytest.mark.parametrize("kind", PREFERENCE_TRAINERS)
def test_the_references_log_probabilities_are_computed_in_a_method(kind: type) -> None:
    theirs = kind.__mro__[2]
    calls(PREFERENCES, theirs._precompute_ref_logps, "self.compute_ref_log_probs")
    calls(PREFERENCES, theirs.compute_ref_log_probs, "model", fused_lm_head="True", labels="labels")


@pytest.mark.parametrize("kind", PREFERENCE_TRAINERS)
def test_the_references_log_probabilities_are_beside_the_rows(kind: type) -> None:
    relies_on(
        PREFERENCES,
        kind._precompute_ref_logps,
        "cache_file = dataset._get_cache_file_path(fingerprint)",
        "os.path.exists(cache_file)",
    )
    relies_on(PREFERENCES, Dataset._get_cache_file_path, "os.path.dirname(self.cache_files[0]['filename'])")


def test_layers_that_can_be_recomputed_have_a_class() -> None:
    relies_on(
        "tools/rlhf/engines/recomputed_layers.py",
        GradientCheckpointingLayer.__init_subclass__,
        "self.gradient_checkpointing and self.training and is_outermost",
        'kwargs["use_cache"] = False',
        'kwargs["past_key_values"] = None',
        'kwargs["layer_past"] = None',
    )
    layers = LlamaForCausalLM(LlamaConfig(**TINY)).model.layers
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def test_a_reference_has_the_policys_dtype() -> None:
    for kind in (GRPOTrainer, RLOOTrainer):
        relies_on(
            "tools/rlhf/algorithms/group_training.py",
            kind.__init__,
            'model_init_kwargs.setdefault("dtype", self.model.dtype)',
            "create_model_from_path(get_config_model_id(self.model.config), **model_init_kwargs)",
        )


@pytest.fixture(scope="module")
def trlx_place() -> Path:
    place = trlx_package.locate()
    trlx_package.import_trlx(place)
    return place


TRLX_TRAINER = "tools/rlhf/engines/trlx_trainer.py"


@needs_trlx
def test_trlx_imports_what_is_stood_in_for(trlx_place: Path) -> None:
    from trlx.models import modeling_base
    from trlx.trainer import accelerate_base_trainer, accelerate_rft_trainer

    ours = "tools/rlhf/engines/trlx_package.py"
    relies_on(ours, accelerate_base_trainer, "import ray", "from ray.air import session", "ray.is_initialized()")
    relies_on(ours, accelerate_rft_trainer, "import wandb")
    source = inspect.getsource(modeling_base)
    assert "prepare_model_for_int8_training" in source, f"re-read {ours}, then docs/upstream.md"
    called = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert not [
        node for node in called if ast.unparse(node.func) == "prepare_model_for_int8_training" and not node.args
    ]


@needs_trlx
def test_a_trainer_asks_git_for_its_name(trlx_place: Path) -> None:
    from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer

    relies_on(TRLX_TRAINER, AccelerateRLTrainer.__init__, "branch = get_git_tag()[0]")


@needs_trlx
def test_a_trainer_waits_at_a_barrier_of_gpus(trlx_place: Path) -> None:
    from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer

    relies_on(
        TRLX_TRAINER,
        AccelerateRLTrainer.__init__,
        "torch.distributed.barrier(device_ids=[int(os.environ.get('LOCAL_RANK', 0))])",
    )


@needs_trlx
def test_the_wrapper_asks_a_method_for_its_inputs(trlx_place: Path) -> None:
    from trlx.models.modeling_base import PreTrainedModelWrapper
    from trlx.models.modeling_ppo import AutoModelForCausalLMWithValueHead

    relies_on(
        TRLX_TRAINER,
        PreTrainedModelWrapper.from_pretrained,
        "model.forward_kwargs = inspect.getfullargspec(model.base_model.forward).args",
    )
    relies_on(TRLX_TRAINER, PreTrainedModelWrapper.get_compatible_forward_kwargs, "k in self.forward_kwargs")
    calls(TRLX_TRAINER, AutoModelForCausalLMWithValueHead.forward, "self.get_compatible_forward_kwargs")
    relies_on(
        TRLX_TRAINER,
        AutoModelForCausalLMWithValueHead.forward,
        "forward_kwargs['output_hidden_states'] = True",
        "outputs = self.base_model(**forward_kwargs)",
    )


@needs_trlx
def test_a_trainer_with_a_frozen_head_makes_no_reference(trlx_place: Path) -> None:
    from trlx.models.modeling_ppo import AutoModelForCausalLMWithHydraValueHead
    from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer

    relies_on(
        TRLX_TRAINER,
        AcceleratePPOTrainer.__init__,
        "not hasattr(self.model, 'frozen_head') and (not self.model.peft_type)",
        "self.ref_model = self.get_arch(self.config)",
    )
    relies_on(
        TRLX_TRAINER,
        AutoModelForCausalLMWithHydraValueHead.__init__,
        "self.num_layers_unfrozen > 0 and (not self.peft_type)",
        "self.frozen_head = None",
    )


@needs_trlx
def test_learn_is_a_loop_over_these_methods(trlx_place: Path) -> None:
    from trlx.models.modeling_ppo import PPOConfig
    from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer

    relies_on(
        TRLX_TRAINER,
        AccelerateRLTrainer.learn,
        "self.prepare_learning()",
        "self.iter_count = 0",
        "results = self.evaluate()",
        "range(self.config.train.epochs)",
        "range(self.n_inner_epochs)",
        "train_dataloader = self.create_train_dataloader()",
        "MiniBatchIterator(train_dataloader, self.mb_size, self.num_mb)",
        "self._accumulate()",
        "loss, stats = self.loss(microbatch)",
        "self.accelerator.backward(loss)",
        "self.opt.step()",
        "self.iter_count >= self.total_steps",
        "self.post_backward_callback()",
        "self.post_epoch_callback()",
    )
    relies_on(
        TRLX_TRAINER,
        AccelerateRLTrainer.__init__,
        "self.model = self.setup_model()",
        "self.scheduler = self.setup_scheduler()",
    )
    relies_on(TRLX_TRAINER, PPOConfig.loss, "n = mask.sum()", "loss = pg_loss + self.vf_coef * vf_loss")
