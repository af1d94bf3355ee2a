"""`--shared-critic`: the critic is a linear head on the policy's body, in one engine (PPO's equation 9, arXiv:1707.06347).

Both losses are computed by a forward pass of their own; an update has the sum of their gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tools.rlhf.engines.engine import Engine
from tools.rlhf.transformers_model import accepted, base_of

BACKWARDS = 2  # of a micro-batch
_POLICY = "policy."


class PolicyWithValueHead(nn.Module):
    """A causal language model and a head on the states in front of its output layer, zero at first."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        model = base_of(policy)
        embedding = model.get_input_embeddings()
        self.head = nn.Linear(embedding.embedding_dim, 1, bias=False, dtype=embedding.weight.dtype)
        nn.init.zeros_(self.head.weight)
        self._states: list[Tensor] = []
        model.base_model.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._states[:] = [output[0]]  # last_hidden_state

    def forward(self, *, values: bool = False, **inputs: Any) -> Any:
        """The language model's output, or the values [B, S]."""
        output = self.policy(**inputs)
        states = self._states.pop()
        return self.head(states).squeeze(-1) if values else output


class PolicyOfBoth:
    """The policy of a `PolicyWithValueHead`'s engine, as an `Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def module(self) -> Any:
        """The language model."""
        return self._engine.module.policy

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Nothing: the critic's `step`, which follows, is of both."""

    def gradient_norm(self) -> float | None:
        """See `Engine`; of the last update, of both losses."""
        return self._engine.gradient_norm()

    def set_learning_rate(self, rate: float) -> None:
        """See `Engine`."""
        self._engine.set_learning_rate(rate)

    def full_weights(self) -> dict[str, Tensor]:
        """See `Engine`; without the head."""
        weights = self._engine.full_weights()
        return {name.removeprefix(_POLICY): each for name, each in weights.items() if name.startswith(_POLICY)}

    def save(self, directory: Path) -> None:
        """See `Engine`; with the head."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """See `Engine`; with the head."""
        self._engine.load(directory)


class CriticOfBoth:
    """The critic of a `PolicyWithValueHead`'s engine, as an `Engine`; its loss has a weight beside the policy's."""

    def __init__(self, engine: Engine, coefficient: float) -> None:
        self._engine, self._coefficient = engine, coefficient

    @property
    def module(self) -> Any:
        """The head: the body is the policy's."""
        return self._engine.module.head

    def __call__(self, **inputs: Any) -> Any:
        # The output layer's logits are not read: one column of them.
        model = self._engine.module.policy
        return self._engine(values=True, **accepted(model, {**inputs, "use_cache": False, "logits_to_keep": 1}))

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(self._coefficient * loss)

    def step(self) -> None:
        """See `Engine`; of both."""
        self._engine.step()

    def gradient_norm(self) -> float | None:
        """See `Engine`."""
        return self._engine.gradient_norm()

    def set_learning_rate(self, rate: float) -> None:
        """Nothing: both have the policy's."""

    def full_weights(self) -> dict[str, Tensor]:
        """The head."""
        return {name: each for name, each in self._engine.full_weights().items() if not name.startswith(_POLICY)}

    def save(self, directory: Path) -> None:
        """Nothing: the policy's state has it."""

    def load(self, directory: Path) -> None:
        """Nothing: the policy's state has it."""
