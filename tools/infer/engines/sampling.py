"""How completions are sampled: the command's flags, and what a row of prompts says in its place.

Names and meanings are those of vLLM's `SamplingParams`, but for `samples` (its `n`) and `json_schema`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.cli import Seed
from shared.errors import UserError

FIELD = "sampling"  # of a row

Tokens = Annotated[int, Field(gt=0, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]


class Sampling(BaseModel):
    """How completions of a prompt are sampled. Penalties and logarithms are of the distribution before temperature."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_tokens: Tokens
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0  # 0: all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the most likely token's probability
    samples: Tokens = 1  # completions of the prompt
    seed: Seed = 0  # sample i is seeded by `seed + i`, independent of the batch
    stop: tuple[Stop, ...] = ()  # texts that end a completion, and are no part of it
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0  # of tokens of prompt and completion
    presence_penalty: Penalty = 0.0  # of tokens of the completion
    frequency_penalty: Penalty = 0.0  # the same, for each time
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # alternatives given beside each token's own
    json_schema: dict[str, Any] | None = None  # the completion is JSON that fits it

    def of_row(self, given: Any, place: str) -> Sampling:
        """This, with the values that a row gives. UserError, with `place`, for a name or value that there is not."""
        if given is None:
            return self
        if not isinstance(given, dict):
            raise UserError(f'{place}: "{FIELD}" is an object, such as {{"temperature": 0.7}}')
        known = {**self.model_dump(), **given}
        stop = known["stop"]
        known["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
        try:
            made = Sampling.model_validate(known)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise UserError(
                    f'{place}: "{FIELD}" has no "{name}"; it has {", ".join(sorted(Sampling.model_fields))}'
                ) from None
            raise UserError(f'{place}: "{FIELD}": {name}: {first["msg"]}') from None
        if made.json_schema is not None:
            check_schema(made.json_schema, f'{place}: "{FIELD}": json_schema')
        return made


def check_schema(schema: Any, place: str) -> None:
    """UserError unless it is a JSON Schema."""
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.path))
        raise UserError(f"{place} is no JSON Schema: {error.message}{f' (at {where})' if where else ''}") from None
