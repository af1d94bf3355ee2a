"""Roll-outs on servers of `infer rollouts`: token ids in and out, one seed a reply."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.console import log
from shared.errors import StageError, UserError
from shared.runtime.agreement import on_every_rank, on_rank_0
from tools.rlhf.data import Prompt
from tools.rlhf.engines.distributed import DistributedContext
from tools.rlhf.lora import Adapters
from tools.rlhf.models import Source
from tools.rlhf.options import PolicyOptions
from tools.rlhf.rollout.adapter_publisher import AdapterPublisher, checked_base
from tools.rlhf.rollout.broadcast_publisher import BroadcastPublisher
from tools.rlhf.rollout.directory_publisher import DirectoryPublisher, run_folder
from tools.rlhf.rollout.rollout import Reply, Rollout, Sequences
from tools.rlhf.rollout.server_publisher import ServerPublisher, run_name
from tools.rlhf.rollout.servers import GonePolicyError, Served, Servers, read_key

ATTEMPTS = 3  # to have all replies of a roll-out from one version


@dataclass(frozen=True, kw_only=True)
class SampledIds:
    """A reply of a server."""

    ids: tuple[int, ...]
    """Token ids, through EOS if there is one."""
    log_probs: tuple[float, ...]
    """Of each token, under softmax(logits / temperature)."""
    ended: bool
    """Whether the last token is EOS."""


@dataclass(frozen=True, kw_only=True)
class ServerSampler:
    """The `Sampler` that asks servers."""

    servers: Servers
    publisher: ServerPublisher
    model: str
    """What the servers call their model."""
    precision: str
    """The coarser of the servers' arithmetic and the dtype in which the policy is published, the source's."""
    tokenizer: Any
    """Decodes the replies."""
    max_new_tokens: int
    temperature: float
    eos_ids: Sequence[int]
    """Tokens that end a reply."""
    pad_id: int
    vocab_size: int
    distributed: DistributedContext

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        """See `Sampler`. StageError for a server that is away, or whose answer is not one of `infer rollouts`."""
        replies = self.replies([prompt.ids for prompt in prompts], seed=seed)
        texts = self.tokenizer.batch_decode([list(reply.ids) for reply in replies], skip_special_tokens=True)
        return Rollout(
            prompts=tuple(prompts),
            replies=tuple(
                Reply(ids=reply.ids, text=text, ended=reply.ended) for reply, text in zip(replies, texts, strict=True)
            ),
            sequences=self._sequences(prompts, replies),
            sampler_log_probs=self.log_probs(replies),
        )

    def replies(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[SampledIds]:
        """One reply to each prompt, all from the version that was published last. Every rank calls it with its own prompts.

        A server that has been restarted, or was given another policy, meanwhile is given the policy again, and all is sampled
        again: a version that is right after the replies was right when they began.
        """
        for _ in range(ATTEMPTS):
            model, gone, replies = on_rank_0(self._assured), "", []
            try:
                requests = [self._request(model, prompt, seed, index) for index, prompt in enumerate(prompts)]
                replies = [self._reply(choice) for choice in self.servers.complete(requests)]
            except GonePolicyError as error:  # of a server that has been restarted, say
                gone = str(error)
            self.distributed.barrier()  # every rank has its replies before rank 0 asks
            wrong = on_rank_0(self.publisher.wrong)
            if on_every_rank(not (wrong or gone), self.distributed.device):
                return replies
            wrong = wrong or gone or "a server did not know the policy that another process asked for"
            log(f"replies are sampled again: {wrong}")
        raise StageError(
            f"{wrong}, after {ATTEMPTS} roll-outs: does another trainer publish to it? The last saved state is kept"
        )

    def _assured(self) -> str:
        """Have all servers answer with the policy; its name in requests. Rank 0 only."""
        self.publisher.assure()
        return self.publisher.requested(self.model)

    def log_probs(self, replies: Sequence[SampledIds]) -> Tensor:
        """[B, T] float32: the sampler's log-probabilities, 0 after the replies."""
        columns = max(len(reply.ids) for reply in replies)
        rows = [[*reply.log_probs, *[0.0] * (columns - len(reply.ids))] for reply in replies]
        return torch.tensor(rows, dtype=torch.float32, device=self.distributed.device)

    def _request(self, model: str, prompt: Sequence[int], seed: int, index: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "seed": (seed * 1_000_003 + index + 1) % 2**63,  # equal prompts with equal seeds would get equal replies
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "ignore_eos": True,  # the end is one of `eos_ids`, whatever the server's files say
            "stop_token_ids": list(self.eos_ids),
        }

    def _reply(self, choice: dict[str, Any]) -> SampledIds:
        try:
            ids = tuple(int(token) for token in choice["token_ids"])
            log_probs = tuple(
                math.nan if value is None else float(value) for value in choice["logprobs"]["token_logprobs"]
            )
        except (KeyError, TypeError, ValueError):
            raise StageError("--rollouts: an answer has no token ids with log-probabilities") from None
        ends = [token in self.eos_ids for token in ids]
        whole = 0 < len(ids) == len(log_probs) and (ends[-1] or len(ids) == self.max_new_tokens)
        if not whole or any(ends[:-1]) or any(not 0 <= token < self.vocab_size for token in ids):
            raise StageError(
                f"--rollouts: a reply of {len(ids)} tokens with {len(log_probs)} log-probabilities ends neither with an end "
                f"token nor after --max-new-tokens {self.max_new_tokens}, or has tokens beyond either; is it `infer rollouts`?"
            )
        if not all(map(math.isfinite, log_probs)):
            raise StageError("--rollouts: a token's log-probability is not finite: the policy computes NaN there")
        return SampledIds(ids=ids, log_probs=log_probs, ended=ends[-1])

    def _sequences(self, prompts: Sequence[Prompt], replies: Sequence[SampledIds]) -> Sequences:
        pad, device = self.pad_id, self.distributed.device
        before, after = max(len(p.ids) for p in prompts), max(len(r.ids) for r in replies)
        rows, masks = [], []
        for prompt, reply in zip(prompts, replies, strict=True):
            left, right = before - len(prompt.ids), after - len(reply.ids)
            rows.append([*[pad] * left, *prompt.ids, *reply.ids, *[pad] * right])
            masks.append([0] * left + [1] * (len(prompt.ids) + len(reply.ids)) + [0] * right)
        mask = torch.tensor(masks, device=device)
        return Sequences(
            ids=torch.tensor(rows, device=device), attention_mask=mask, reply_mask=mask[:, before:].float()
        )


def log_sampler(options: PolicyOptions, sampler: object) -> None:
    """The line of the plan that says who samples."""
    if isinstance(sampler, ServerSampler):
        way = f"by way of {options.policies}" if options.policies else "by broadcast"
        what = "adapters" if options.publish_by == "adapter" else "policies"
        log(f"roll-outs {', '.join(options.rollouts)} in {sampler.precision}, {what} {way}")


@contextmanager
def _publisher(
    options: PolicyOptions, source: Source, servers: Servers, served: Sequence[Served], adapters: Adapters | None
) -> Iterator[ServerPublisher]:
    """The publisher of `--publish-by`. UserError for servers that do not take what it publishes."""
    if options.publish_by == "broadcast":
        yield BroadcastPublisher(run_name(options.target), source, servers, adapters)
        return
    assert options.policies is not None, "checked with the flags"
    if options.publish_by == "directory":
        with DirectoryPublisher.open(options.policies, options.target, source, servers, adapters) as publisher:
            yield publisher
        return
    assert adapters is not None, "checked with the flags"
    base = on_rank_0(lambda: checked_base(options.rollouts, served, adapters))
    with run_folder(options.policies, options.target) as folder:
        yield AdapterPublisher(folder, source, servers, adapters, base=base)


@contextmanager
def server_sampler(
    options: PolicyOptions,
    source: Source,
    prompts: Sequence[Prompt],
    distributed: DistributedContext,
    adapters: Adapters | None = None,
) -> Iterator[ServerSampler | None]:
    """The sampler of `--rollouts`; None without. Removes what was published at the end.

    Raises:
        UserError: a server is not there, or its context is too short.
    """
    if not options.rollouts:
        yield None
        return
    key = read_key(options.rollout_key_file) if options.rollout_key_file else None
    servers = Servers(addresses=options.rollouts, timeout=options.rollout_timeout, key=key)
    served = on_rank_0(servers.describe)
    longest = max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens
    for address, said in zip(options.rollouts, served, strict=True):
        if said.max_model_len < longest:
            raise UserError(
                f"--rollouts {address} has a context of {said.max_model_len} tokens, and the longest prompt with its reply takes "
                f"{longest}; start it with a longer --max-model-len, or lower --max-new-tokens"
            )
        if (said.model, said.precision) != (served[0].model, served[0].precision):
            raise UserError(
                f"--rollouts {address} serves {said.model} in {said.precision}, and {options.rollouts[0]} {served[0].model} in "
                f"{served[0].precision}; start both alike"
            )
        if said.lora_rank and options.publish_by != "adapter":
            raise UserError(
                f"--rollouts {address} takes adapters alone: give --publish-by adapter, or start it without --lora-rank"
            )
    with _publisher(options, source, servers, served, adapters) as publisher:
        yield ServerSampler(
            servers=servers,
            publisher=publisher,
            model=served[0].model,
            precision=served[0].precision
            if source.dtype == torch.float32
            else str(source.dtype).removeprefix("torch."),
            tokenizer=source.tokenizer,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            eos_ids=source.eos_ids,
            pad_id=source.pad_id,
            vocab_size=source.vocab_size,
            distributed=distributed,
        )
