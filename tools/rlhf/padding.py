"""The padding token of a reward model. transformers scores a sequence at its last token that is not padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shared.console import log
from shared.errors import UserError
from tools.rlhf.data import end_token_id
from tools.rlhf.models import Source

_NEW = "<|pad|>"


def with_padding_token(source: Source) -> Source:
    """The source with a padding token that ends no sequence: its own, or else a spare token of its tokenizer.

    Where padding is the end token, transformers' sequence-classification models score the token before it, and an ended reply
    like a cut one. The tokenizer of `source` is changed in place.

    Raises:
        UserError: the tokenizer has no spare token and the embedding no spare row.
    """
    tokenizer = source.tokenizer
    ends = {tokenizer.eos_token_id, end_token_id(tokenizer)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return source
    token = next(_spare_tokens(tokenizer, {*ends, *source.eos_ids}, source.config.vocab_size), None)
    if token is None:
        raise UserError(
            f"--source {source.path}: no token to pad with but {tokenizer.eos_token!r}, at which a reward model scores; add "
            "a pad_token to the tokenizer, and a row for it to the model (resize_token_embeddings)"
        )
    tokenizer.add_special_tokens({"pad_token": token})
    log(f"padding   {token!r} (token {tokenizer.pad_token_id}): the model's own is missing or its end token")
    return replace(source, pad_id=tokenizer.pad_token_id)


def _spare_tokens(tokenizer: Any, ends: set[int], vocab_size: int) -> Iterator[str]:
    """Tokens that no text of a conversation has, the likeliest first."""
    vocab, template = tokenizer.get_vocab(), tokenizer.chat_template or ""
    used = {*ends, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id}
    special = [
        added.content
        for number, added in sorted(tokenizer.added_tokens_decoder.items())
        if added.special and number not in used and number < vocab_size and added.content not in template
    ]
    for name in ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD>"):
        if vocab.get(name, vocab_size) < vocab_size and vocab[name] not in used:
            yield name
    for word in ("pad", "reserved", "unused"):
        yield from (name for name in special if word in name.lower())
    if len(vocab) < vocab_size and max(vocab.values()) == len(vocab) - 1:  # a new token is a row that exists
        yield _NEW
    if tokenizer.unk_token in special:
        yield tokenizer.unk_token
    yield from special
