"""trlx's PPO trainer on our experience. Import it after `trlx_package.import_trlx`.

Of trlx: the value head, accelerate's preparation of model and optimizer (DDP, or its DeepSpeed plugin), the store of
experience, generalized advantages with whitening, PPO's loss, and the loop over epochs, mini-batches and micro-batches.
Ours: the roll-out, its rewards and KL penalty, log-probabilities at the sampling temperature, masks, state and metrics. trlx
itself tokenises replies again, takes a padding token that a policy may sample for padding, and estimates KL over prompts, too.

Shapes: B replies, P prompt columns, T reply columns, as in `tools.rlhf.rollout.rollout`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trlx.trainer.accelerate_base_trainer as base_trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from trlx.data.default_configs import default_ppo_config
from trlx.data.ppo_types import PPORLBatch, PPORLElement
from trlx.models.modeling_ppo import AutoModelForCausalLMWithHydraValueHead
from trlx.pipeline.ppo_pipeline import ppo_collate_fn
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer

from shared.errors import UserError
from tools.rlhf.algorithms import losses
from tools.rlhf.algorithms.experience import Experience
from tools.rlhf.engines.deepspeed import gathered_weights, load_engine, save_engine, trains_part
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.engines.trlx_settings import TrlxSettings
from tools.rlhf.rollout.rollout import Sequences
from tools.rlhf.transformers_model import accepted

_NO_TOKEN = -1
"""trlx's padding: no token that a policy may sample."""
_STATE = "trlx.pt"
_STATISTICS = {
    "policy_loss": "losses/policy_loss",
    "value_loss": "losses/value_loss",
    "clip_fraction": "policy/clipfrac",
    "value_clip_fraction": "values/clipfrac",
}
"""Metric -> trlx's name."""


class PolicyWithValueHead(AutoModelForCausalLMWithHydraValueHead):
    """trlx's wrapper: a transformers model and a value head on its last states, without branches of frozen layers."""

    def get_compatible_forward_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """The inputs that the model takes. trlx asks `getfullargspec`, which sees transformers' decorators."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        return accepted(self.base_model, {**given, "use_cache": False})

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """torch's: trlx's writes the wrapper's prefix twice."""
        return nn.Module.state_dict(self, *args, **kwargs)


@register_trainer
class OwnExperienceTrainer(AcceleratePPOTrainer):
    """trlx's trainer; `train_on` makes the updates of one iteration."""

    def __init__(self, model: PolicyWithValueHead, settings: TrlxSettings, distributed: DistributedContext) -> None:
        self._wrapped, self._settings, self._distributed = model, settings, distributed
        self._learning_rate = 0.0
        self._totals = dict.fromkeys(_STATISTICS, 0.0)
        self._norms: list[float] = []
        self._moved: list[float] = []
        self._seed = 0
        config = default_ppo_config()
        for section, values in settings.sections().items():
            vars(getattr(config, section)).update(values)
        with _without_git(), _barriers_of_this_machine(distributed):
            super().__init__(config)
        self.ref_mean, self.ref_std = None, None

    @property
    def tokenizer(self) -> Any:
        """What trlx reads of a tokenizer: it tokenises nothing here."""
        return SimpleNamespace(pad_token_id=_NO_TOKEN, eos_token_id=_NO_TOKEN, pad_token="", padding_side="left")

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        """trlx reads the source's and adds a token to it."""

    @property
    def model(self) -> Any:
        """The prepared model: the wrapper, in DDP or a DeepSpeed engine or neither."""
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        """trlx asks the prepared model for the wrapper's attributes, which DDP does not hand on."""
        self._model = model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.frozen_head, model.peft_type = None, None

    def setup_model(self) -> PolicyWithValueHead:
        """The given model; no layer is frozen here."""
        return self._wrapped

    def setup_scheduler(self) -> LambdaLR:
        """The rate that was set, at every update; the optimizer's own is 1."""
        return LambdaLR(self.opt, lambda update: self._learning_rate)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all later updates."""
        self._learning_rate = rate
        for group in self.opt.param_groups:
            group["lr"] = rate

    def prepare_learning(self) -> None:
        """`learn` makes the epochs over what is in the store, and neither saves nor samples."""
        self.n_inner_epochs, self.total_steps = self._settings.epochs, self.config.train.total_steps

    def evaluate(self) -> dict[str, float]:
        """trlx samples its prompts before and after: the caller does."""
        return {}

    def post_backward_callback(self) -> None:
        """trlx adapts its KL coefficient: the caller does."""

    def post_epoch_callback(self) -> None:
        """trlx rolls out: the caller does."""

    def create_train_dataloader(self) -> DataLoader:
        """The store in an order of its own for each epoch, a function of the seed."""
        self._seed += 1
        return DataLoader(
            self.store,
            self.config.train.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self._seed),
            collate_fn=partial(ppo_collate_fn, "left", _NO_TOKEN),
        )

    @contextmanager
    def _accumulate(self) -> Iterator[None]:
        """One micro-batch: gradients are summed over processes, clipped and applied with the last of a mini-batch.

        trlx counts on an accelerate that leaves DeepSpeed's steps to DeepSpeed's own count.
        """
        self.mb_count += 1
        last = self.mb_count % self.num_mb == 0
        self.accelerator.sync_gradients = last
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            yield
        if last:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self._settings.max_gradient_norm)
            if norm is not None:
                self._norms.append(float(norm))

    def outputs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Logits [B, P + T, vocabulary] and values [B, P + T], float32, of the prepared model."""
        outputs = self.model(**sequences.inputs, return_dict=True)
        return outputs.logits, outputs.value.float()

    def loss(self, batch: PPORLBatch) -> tuple[Tensor, dict[str, Any]]:
        """trlx's advantages and loss of a micro-batch, of log-probabilities at the sampling temperature."""
        settings, device = self._settings, self.accelerator.device
        batch = PPORLBatch(**{name: value.to(device) for name, value in vars(batch).items()})
        tokens = torch.cat([batch.query_tensors, batch.response_tensors], dim=1)
        mask = (batch.response_tensors != _NO_TOKEN).float()
        sequences = Sequences(
            ids=tokens.clamp(min=0), attention_mask=(tokens != _NO_TOKEN).long(), reply_mask=mask
        ).rows(torch.arange(len(tokens), device=device))
        columns = sequences.reply_mask.shape[1]
        old_log_probs, old_values, rewards = (
            values[:, :columns] for values in (batch.logprobs, batch.values, batch.rewards)
        )
        advantages, returns = self.config.method.get_advantages_and_returns(
            old_values, rewards, columns, use_whitening=settings.whiten_advantages
        )
        logits, values = self.outputs(sequences)
        at = slice(-columns - 1, -1)
        log_probs = losses.token_log_probs(logits[:, at], sequences.reply_ids, settings.temperature)
        loss, statistics = self.config.method.loss(
            logprobs=log_probs,
            values=values[:, at],
            old_logprobs=old_log_probs,
            old_values=old_values,
            advantages=advantages,
            returns=returns,
            mask=sequences.reply_mask,
        )
        for name, theirs in _STATISTICS.items():
            self._totals[name] += float(statistics[theirs])
        mask = sequences.reply_mask
        self._moved.append(float(losses.update_kl(log_probs, old_log_probs, mask, mask.sum())))
        return loss, statistics

    def train_on(self, experience: Experience, *, seed: int) -> dict[str, float]:
        """The updates of an iteration, by trlx's `learn`. Returns metrics, averaged over micro-batches and ranks.

        Args:
            experience: this rank's replies.
            seed: of the order of replies.
        """
        self._seed = seed
        self._totals, self._norms, self._moved = dict.fromkeys(_STATISTICS, 0.0), [], []
        self.store.clear_history()
        self.push_to_store(elements(experience))
        before = self.mb_count
        self.learn()
        totals = torch.tensor(list(self._totals.values()), dtype=torch.float64, device=self.accelerator.device)
        totals = self._distributed.sum(totals) / ((self.mb_count - before) * self._distributed.world_size)
        row = dict(zip(_STATISTICS, totals.tolist(), strict=True))
        moved = torch.tensor(self._moved, dtype=torch.float64, device=self.accelerator.device)
        moved = self._distributed.sum(moved.reshape(-1, self.num_mb).mean(1)) / self._distributed.world_size
        row |= {"updates": float(len(moved)), "update_kl": moved.mean().item(), "update_kl_max": moved.max().item()}
        return row | ({"gradient_norm": sum(self._norms) / len(self._norms)} if self._norms else {})

    def write(self, directory: Path) -> None:
        """Write optimizer and model, without what is frozen; every rank calls it."""
        if self._settings.zero:
            save_engine(self.model, directory, trained_only=trains_part(self._wrapped))
        elif self._distributed.rank == 0:
            directory.mkdir(parents=True)
            torch.save({"model": self._trained(), "optimizer": self.opt.state_dict()}, directory / _STATE)

    def read(self, directory: Path) -> None:
        """Read what `write` wrote.

        Raises:
            UserError: a file is damaged, or holds more than tensors and plain values.
        """
        if self._settings.zero:
            load_engine(self.model, directory, trained_only=trains_part(self._wrapped))
            return
        try:
            state = torch.load(directory / _STATE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{directory / _STATE} is no file that this state was saved with, or is damaged "
                f"({str(error).splitlines()[0]}); start anew with --overwrite"
            ) from None
        with torch.no_grad():
            for name, tensor in self._trained().items():
                tensor.copy_(state["model"][name])
        self.opt.load_state_dict(state["optimizer"])

    def _trained(self) -> dict[str, Tensor]:
        """What is trained, without buffers, which are never changed; not sharded."""
        named = self._wrapped.named_parameters()
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def elements(experience: Experience) -> list[PPORLElement]:
    """trlx's elements of an experience: prompts and replies without padding."""
    found, sequences = [], experience.sequences
    columns = sequences.reply_mask.shape[1]
    for row, length in enumerate(sequences.reply_mask.sum(-1).long().tolist()):
        prompt = sequences.attention_mask[row, :-columns].bool()
        found.append(
            PPORLElement(
                query_tensor=sequences.ids[row, :-columns][prompt].cpu(),
                response_tensor=sequences.reply_ids[row, :length].cpu(),
                logprobs=experience.log_probs[row, :length].cpu(),
                values=experience.values[row, :length].cpu(),
                rewards=experience.rewards[row, :length].cpu(),
            )
        )
    return found


class TrlxActor:
    """The policy of a trainer, as the `Engine` of our loop. Updates are the trainer's own."""

    def __init__(self, trainer: OwnExperienceTrainer) -> None:
        self.trainer = trainer
        self.values: tuple[Tensor | None, Tensor | None] = (None, None)
        """Input ids of the last forward pass and its values."""

    @property
    def module(self) -> Any:
        """The transformers model, in PEFT's with LoRA."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model).base_model

    def __call__(self, **inputs: Any) -> Any:
        """Logits of all columns: the wrapper has no `logits_to_keep`."""
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        sequences = Sequences(ids=input_ids, attention_mask=attention_mask, reply_mask=attention_mask[:, :0])
        logits, values = self.trainer.outputs(sequences)
        self.values = (input_ids, values)
        return SimpleNamespace(logits=logits)

    def backward(self, loss: Tensor) -> None:
        raise AssertionError("trlx makes the updates")

    def step(self) -> None:
        raise AssertionError("trlx makes the updates")

    def gradient_norm(self) -> float | None:
        """None: `train_on` returns it."""
        return None

    def set_learning_rate(self, rate: float) -> None:
        """See `Engine`; of policy and value head."""
        self.trainer.set_learning_rate(rate)

    def full_weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return gathered_weights(self.module, torch.distributed.get_rank(), trained_only=trains_part(self.module))

    def save(self, directory: Path) -> None:
        """See `Engine`; with the value head."""
        self.trainer.write(directory)

    def load(self, directory: Path) -> None:
        """See `Engine`."""
        self.trainer.read(directory)


class TrlxValues:
    """The value head, as the critic of our loop: trained, saved and loaded with the policy."""

    def __init__(self, actor: TrlxActor) -> None:
        self._actor = actor

    @property
    def module(self) -> Any:
        """The value head."""
        return self._actor.trainer.accelerator.unwrap_model(self._actor.trainer.model).v_head

    def __call__(self, **inputs: Any) -> Tensor:
        """Values [B, S], of the policy's forward pass of the same ids if that was its last."""
        ids, values = self._actor.values
        if ids is not inputs["input_ids"] or values is None:
            self._actor(**inputs)
            values = self._actor.values[1]
        assert values is not None, "a forward pass keeps them"
        return values

    def backward(self, loss: Tensor) -> None:
        raise AssertionError("trlx makes the updates")

    def step(self) -> None:
        raise AssertionError("trlx makes the updates")

    def gradient_norm(self) -> float | None:
        """None: it is part of the policy's."""
        return None

    def set_learning_rate(self, rate: float) -> None:
        """Nothing to do: the policy's."""

    def full_weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return gathered_weights(self.module, torch.distributed.get_rank())

    def save(self, directory: Path) -> None:
        """Nothing to do: it is in the policy's."""

    def load(self, directory: Path) -> None:
        """Nothing to do: it is in the policy's."""


def open_trainer(model: Any, settings: TrlxSettings, distributed: DistributedContext) -> OwnExperienceTrainer:
    """A trainer of a policy with a new value head.

    Args:
        model: the transformers model, or PEFT's; what is trained of it is float32.
        settings: of trlx and accelerate.
        distributed: the ranks.

    Raises:
        UserError: trlx finds no width of the model's states.
    """
    from accelerate import PartialState

    cpu = distributed.device.type == "cpu"
    torch.manual_seed(settings.seed)  # of the value head, the same on every rank
    try:
        wrapped = PolicyWithValueHead(model, num_layers_unfrozen=-1)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--source: trlx makes no value head for {type(model).__name__} ({reason}); use --backend deepspeed"
        ) from None
    with _environment(settings.environment(cpu=cpu)):
        if cpu:
            PartialState(cpu=True)
        return OwnExperienceTrainer(wrapped, settings, distributed)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that accelerate reads while a trainer is made."""
    before = dict(os.environ)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in {*values, "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"}:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


@contextmanager
def _without_git() -> Iterator[None]:
    """trlx asks git for the commit of the working directory, which need not be one, on a machine that may have no git."""
    theirs = base_trainer.get_git_tag
    base_trainer.get_git_tag = lambda: ("", "")
    try:
        yield
    finally:
        base_trainer.get_git_tag = theirs


@contextmanager
def _barriers_of_this_machine(distributed: DistributedContext) -> Iterator[None]:
    """trlx names a GPU in its barrier; gloo has none."""
    if distributed.device.type == "cuda":
        yield
        return
    whole = torch.distributed.barrier
    torch.distributed.barrier = lambda *args, device_ids=None, **kwargs: whole(*args, **kwargs)
    try:
        yield
    finally:
        torch.distributed.barrier = whole
