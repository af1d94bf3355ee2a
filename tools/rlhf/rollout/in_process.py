"""Roll-outs in the training process, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        """See `Sampler`. Reseeds torch's generators."""
        from transformers import GenerationConfig, LogitsProcessorList

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
        record = SampledLogProbs(self.temperature)
        ids = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([record]),
            synced_gpus=self.synced_gpus,
        )
        record.note(ids)
        reply_ids = ids[:, width:]
        ends = torch.isin(reply_ids, torch.tensor(self.eos_ids, device=device))
        reply_mask = (ends.cumsum(-1) - ends.long()) == 0  # 1 through the first EOS
        log_probs = torch.cat(record.columns, dim=1)[:, : reply_ids.shape[1]]
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
    )
