"""How a continuation becomes tokens, and which lengths can be scored, for the harness's model classes of both engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Texts to encode a continuation after, where the tokenizer puts something before the first word of a text.
_LEADS = ("", "\n", ".", "a", "0", "|", "\n.")
_SHOWN = 60  # characters of a text in a message


class CheckedRequests:
    """A base of the harness's class: every continuation has tokens of its own, and what cannot fit is refused by name.

    The harness takes for a continuation the tokens of `context + continuation` beyond the number of the context's. Where
    the first letters join the context's last token, that is none (log-likelihood 0, the best there is) or tokens of
    another text.
    """

    longest_continuation: (
        int  # tokens: the context length without the one token before, and the one that vLLM generates
    )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        encoded = []
        for request in requests:
            context, continuation = request.args
            if not continuation:
                raise _refused(request, "a choice is empty, so it has no likelihood; remove it from the data")
            before, after = self._pair(context, continuation, request)
            if len(after) > self.longest_continuation:
                raise _refused(
                    request,
                    f"the choice {_short(continuation)} has {len(after)} tokens and {self.longest_continuation} fit the "
                    "context; leave the example out",
                )
            encoded.append(((context, continuation), before, after))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)  # type: ignore[attr-defined]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        for request in requests:
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]  # type: ignore[attr-defined]
            if wanted >= self.longest_continuation:
                raise _refused(
                    request,
                    f"max_gen_toks {wanted} leaves no room for a prompt in the context; at most "
                    f"{self.longest_continuation - 1} in the task's generation_kwargs",
                )
            if not request.args[0]:
                raise _refused(request, "the prompt is empty; write a first word in doc_to_text")
        return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]

    def _pair(self, context: str, continuation: str, request: Instance) -> tuple[list[int], list[int]]:
        """Token ids of the context (at least one) and of the continuation (at least one)."""
        encode: Any = self.tok_encode  # type: ignore[attr-defined]
        if not context:
            after = encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]  # type: ignore[attr-defined]
            return (after[:1], after[1:]) if after[:1] == before and after[1:] else (before, after)
        spaces = len(context) - len(context.rstrip())
        if context.strip():  # as the harness does: a space belongs to the word after it
            context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
        whole, before = encode(context + continuation), encode(context)
        if len(whole) > len(before) and whole[: len(before)] == before:
            return before, whole[len(before) :]
        for lead in _LEADS:
            start = encode(lead, add_special_tokens=False) if lead else []
            both = encode(lead + continuation, add_special_tokens=False)
            own = both[len(start) :]
            if both[: len(start)] == start and own and self._text([*before, *own]) == self._text(whole):
                return before, own
        raise _refused(
            request,
            f"the tokenizer has no tokens of its own for {_short(continuation)} after {_short(context[-_SHOWN:])}",
        )

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))  # type: ignore[attr-defined]


def _refused(request: Instance, problem: str) -> UserError:
    return UserError(f"--tasks {request.task_name}: example {request.doc_id}: {problem}")


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
