"""The tokens around a document of pretraining text: which one ends it, and whether a BOS token begins it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.errors import UserError

# Chat models name the end of a turn as their eos token. Text that ends with it would teach a model to end documents as turns.
# Of Qwen, Yi, SmolLM, StableLM and Phi 4; Llama 3 and 4; gpt-oss; Phi 3; Gemma; Command R.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>")
# What the same vocabularies end documents with; the first that is there.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "<EOS_TOKEN>", "</s>")


@dataclass(frozen=True, kw_only=True)
class DocumentTokens:
    """The tokens around each document."""

    end: str
    end_id: int
    begin: str | None  # None: none
    begin_id: int | None
    reason: str  # why these, for the log

    @classmethod
    def of(cls, tokenizer: Any, end_of_document: str | None, bos: bool | None) -> DocumentTokens:
        """As asked for, or, where None, as the tokenizer says.

        Raises:
            UserError: the tokenizer has no such token.
        """
        vocabulary = tokenizer.get_vocab()
        end, reason = (end_of_document, "--end-of-document") if end_of_document else _default_end(tokenizer, vocabulary)
        if end not in vocabulary:
            known = ", ".join(token for token in DOCUMENT_ENDS if token in vocabulary) or tokenizer.eos_token
            raise UserError(f"--end-of-document {end}: no token of the tokenizer; its ends of documents: {known}")
        begins = _adds_bos(tokenizer) if bos is None else bos
        if begins and tokenizer.bos_token_id is None:
            raise UserError("--bos: the tokenizer names no bos_token in tokenizer_config.json; leave it out")
        if bos is not None:
            reason += ", --bos" if bos else ", --no-bos"
        elif begins:
            reason += "; the tokenizer itself begins a text with its bos token"
        return cls(
            end=end,
            end_id=vocabulary[end],
            begin=tokenizer.bos_token if begins else None,
            begin_id=tokenizer.bos_token_id if begins else None,
            reason=reason,
        )

    def __str__(self) -> str:
        begin = f"begins with {self.begin} ({self.begin_id}) and " if self.begin else ""
        return f"each document {begin}ends with {self.end} ({self.end_id}): {self.reason}"


def _default_end(tokenizer: Any, vocabulary: dict[str, int]) -> tuple[str, str]:
    """The token that ends documents, and why."""
    eos = tokenizer.eos_token
    if eos is None:
        raise UserError(
            "--tokenizer has no eos_token in tokenizer_config.json; name the token that ends documents with --end-of-document"
        )
    other = next((token for token in DOCUMENT_ENDS if token in vocabulary), None)
    if eos in TURN_ENDS and other:
        return other, f"the eos token {eos} ends a turn of a chat"
    return eos, "the tokenizer's eos token"


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its bos token before a text (Gemma, Llama, Mistral, DeepSeek)."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
