"""Roll-outs in the training process, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tools.rlhf.data import Prompt
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.models import Source
from tools.rlhf.options import PolicyOptions
from tools.rlhf.rollout.rollout import Reply, Rollout, Sequences


class SampledLogProbs:
    """A logits processor that records the log-probabilities of the sampled tokens; logits are unchanged.

    Each call looks up the previously sampled token. `output_logits` of `generate` would keep [T, B, vocabulary].
    """

    def __init__(self, temperature: float) -> None:
        self.columns: list[Tensor] = []
        self._temperature = temperature
        self._previous: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(input_ids)
        self._previous = torch.log_softmax(scores.float() / self._temperature, dim=-1)
        return scores

    def note(self, input_ids: Tensor) -> None:
        """Look up the last token; call it once more after generation."""
        if self._previous is not None:
            self.columns.append(self._previous.gather(1, input_ids[:, -1:]))


class RowNoise:
    """A logits processor that samples each row with a random generator of its own: a reply does not depend on its batch.

    Of softmax(logits / temperature), as the arg max of `logits / temperature - log(q)` with q from Exp(1) (Gumbel-max, as
    `torch.multinomial`): the logits of all other tokens become -inf.
    """

    def __init__(self, seed: int, rows: range, temperature: float, device: torch.device) -> None:
        """`rows`: numbers of the rows in the roll-out."""
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed((seed * 1_000_003 + row + 1) % 2**63) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        chosen = (scores.float() / self._temperature - noise.log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def generate_in_parts(
    generate: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    *,
    temperature: float,
    pad_id: int,
    size: int | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Prompts with their sampled replies [B, P + T], and the log-probabilities of the reply tokens [B, T].

    Args:
        generate: transformers', with its settings.
        inputs: tensors of B rows.
        temperature: of sampling.
        pad_id: follows replies that are shorter than the longest of another part.
        size: rows of a call of `generate`, each then sampled from `seed` and its own number; None: all rows at once, from torch's
            generator.
        seed: of the roll-out.
    """
    from transformers import LogitsProcessorList

    count = len(inputs["input_ids"])
    ids, log_probs = [], []
    for start in range(0, count, size or count):
        part = {name: tensor[start : start + (size or count)] for name, tensor in inputs.items()}
        rows = range(start, start + len(part["input_ids"]))
        record = SampledLogProbs(temperature)
        processors: list[Any] = [record]
        if size is not None:
            processors.append(RowNoise(seed, rows, temperature, part["input_ids"].device))
        ids.append(generate(**part, logits_processor=LogitsProcessorList(processors)))
        record.note(ids[-1])
        log_probs.append(torch.cat(record.columns, dim=1))
    longest = max(part.shape[1] for part in ids)
    padded = [functional.pad(part, (0, longest - part.shape[1]), value=pad_id) for part in ids]
    columns = max(part.shape[1] for part in log_probs)
    return torch.cat(padded), torch.cat([functional.pad(part, (0, columns - part.shape[1])) for part in log_probs])


@dataclass(frozen=True, kw_only=True)
class InProcessSampler:
    """The `Sampler` that calls `generate` on the trained policy."""

    model: Any
    """A transformers causal language model."""
    tokenizer: Any
    """Decodes the replies."""
    max_new_tokens: int
    """Maximum T."""
    temperature: float
    """Sampling temperature."""
    eos_ids: Sequence[int]
    """Tokens that end a reply."""
    pad_id: int
    """Padding token; may be one of `eos_ids`."""
    synced_gpus: bool
    """Whether all ranks take the same number of steps, as ZeRO-3 requires."""
    micro_batch_size: int | None = None
    """Replies that are sampled at once; None: all."""

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        """See `Sampler`. Reseeds torch's generators."""
        from transformers import GenerationConfig

        torch.manual_seed(seed)
        device, pad = next(self.model.parameters()).device, self.pad_id
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.tensor([[*[pad] * (width - len(p.ids)), *p.ids] for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.eos_ids),
            pad_token_id=pad,
            use_cache=True,
        )
        ids, columns = generate_in_parts(
            partial(self.model.generate, generation_config=settings, synced_gpus=self.synced_gpus),
            {"input_ids": ids, "attention_mask": mask},
            temperature=self.temperature,
            pad_id=pad,
            size=self.micro_batch_size,
            seed=seed,
        )
        reply_ids = ids[:, width:]
        ends = torch.isin(reply_ids, torch.tensor(self.eos_ids, device=device))
        reply_mask = (ends.cumsum(-1) - ends.long()) == 0  # 1 through the first EOS
        log_probs = columns[:, : reply_ids.shape[1]]
        return Rollout(
            prompts=tuple(prompts),
            replies=_replies(reply_ids, reply_mask, ends, self.tokenizer),
            sequences=Sequences(
                ids=ids,
                attention_mask=torch.cat([mask, reply_mask.long()], dim=1),
                reply_mask=reply_mask.float(),
            ),
            sampler_log_probs=torch.where(reply_mask, log_probs, 0.0),
        )


def _replies(ids: Tensor, mask: Tensor, ends: Tensor, tokenizer: Any) -> tuple[Reply, ...]:
    rows = [tuple(row[: int(length)]) for row, length in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]
    texts = tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)
    ended = ends.any(-1).tolist()
    return tuple(Reply(ids=row, text=text, ended=end) for row, text, end in zip(rows, texts, ended, strict=True))


def policy_sampler(
    options: PolicyOptions, source: Source, model: Any, distributed: DistributedContext
) -> InProcessSampler:
    """The sampler of a policy in training, by a command's options."""
    return InProcessSampler(
        model=model,
        tokenizer=source.tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        eos_ids=source.eos_ids,
        pad_id=source.pad_id,
        synced_gpus=options.zero == 3 and distributed.world_size > 1,
        micro_batch_size=options.rollout_micro_batch_size,
    )
