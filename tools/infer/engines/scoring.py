"""Tokenisation and length checks of continuations, shared by the harness's model classes of both engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Prefixes for encoding a continuation alone: some tokenizers add a token or space before a text's first word.
_LEADS = ("", "\n", ".", "a", "0", "|", "\n.")
_SHOWN = 60  # maximum characters of a text in an error message


class CheckedRequests:
    """Mix-in for the harness's model classes: exact continuation tokens, UserError for an example that does not fit.

    The harness takes `encode(context + continuation)[len(encode(context)):]` as the continuation. If the tokenizer merges
    the continuation's first characters into the context's last token, that slice is empty (log-likelihood 0, the maximum)
    or has tokens of another text.
    """

    longest_continuation: (
        int  # tokens: the context length minus one context token and the one token that vLLM generates
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
        if context.strip():  # as in the harness: trailing spaces move to the continuation
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
