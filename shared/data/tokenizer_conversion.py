"""Tokenizers without tokenizer.json: sentencepiece models and tiktoken's tables as fast tokenizers. No code of a model is run.

What their own classes add in code, special tokens above all, is written down here for the classes that have no file for it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

from shared.errors import UserError

SENTENCEPIECE = "tokenizer.model"
TIKTOKEN = "qwen.tiktoken"
_CONTROL, _USER_DEFINED, _BYTE, _UNKNOWN = 3, 4, 6, 2  # types of pieces in sentencepiece_model.proto
_NOT_TEXT = (_CONTROL, _USER_DEFINED, _BYTE, _UNKNOWN)
_BPE = 2  # of its model types
_SPACE = "\u2581"

# Tokens that a published class adds behind its file's, in this order, and its end and padding tokens.
_ADDED: dict[str, tuple[str, ...]] = {
    # Qwen 1: tokenization_qwen.py
    "QWenTokenizer": (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *(f"<|extra_{number}|>" for number in range(205)),
    ),
    # ChatGLM3: tokenization_chatglm.py
    "ChatGLMTokenizer": (
        *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
}
_NAMED: dict[str, dict[str, str]] = {
    "QWenTokenizer": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "ChatGLMTokenizer": {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"},
}
# Classes that begin a text with their bos token unless `add_bos_token` says otherwise.
_BEGINNING = ("BaichuanTokenizer", "InternLM2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast")
# Qwen 1's split of a text, before byte pairs are merged.
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convertible(directory: Path) -> Path | None:
    """The vocabulary of a directory that has no tokenizer.json; None if there is none that is read here."""
    if (directory / "tokenizer.json").is_file():
        return None
    return next((directory / name for name in (TIKTOKEN, SENTENCEPIECE) if (directory / name).is_file()), None)


def convert(directory: Path, *, flag: str) -> Any:
    """A fast tokenizer of transformers from the directory's vocabulary and tokenizer_config.json.

    Raises:
        UserError: the vocabulary cannot be read, or does what a fast tokenizer does not do.
    """
    from transformers import PreTrainedTokenizerFast

    path = convertible(directory)
    assert path is not None
    file = directory / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kind = str(settings.get("tokenizer_class"))
    if path.name == SENTENCEPIECE:
        made, control = _of_sentencepiece(path, settings, flag)
    else:
        made, control = _of_tiktoken(path, kind, flag), []
    named = {
        name: _text(value)
        for name, value in {**_NAMED.get(kind, {}), **settings}.items()
        if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value
    }
    _add_tokens(made, settings, kind, control + list(named.values()), flag, path)
    _add_ends(made, settings, kind, named)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length") or 10**30,
        **named,
    )


def _text(token: Any) -> str:
    """A token as tokenizer_config.json writes it: text, or an object with the text in it."""
    return str(token["content"] if isinstance(token, dict) else token)


def _of_sentencepiece(path: Path, settings: dict[str, Any], flag: str) -> tuple[Any, list[str]]:
    """The model as a tokenizer of `tokenizers`, and its control pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own
        raise UserError(f"{flag} {path}: not a sentencepiece model; fetch it again") from error
    normal, trainer = proto.normalizer_spec, proto.trainer_spec
    obstacles = {
        "no BPE": trainer.model_type != _BPE,
        "it removes or moves white space": normal.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix,
        "it normalises characters": bool(
            normal.precompiled_charsmap
        ),  # tokenizers' form of it parts from it in clusters
    }
    if what := next((what for what, there in obstacles.items() if there), None):
        raise UserError(
            f"{flag} {path}: a sentencepiece model of another kind ({what}); save tokenizer.json with its own class in "
            "transformers"
        )
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    named = {int(number): _text(token) for number, token in settings.get("added_tokens_decoder", {}).items()}
    for number, content in named.items():
        if number < len(pieces) and pieces[number][0] != content:  # named anew: <|im_end|> for [UNUSED_TOKEN_145]
            old, _, kind = pieces[number]
            if kind not in _NOT_TEXT and not re.search("unused|reserved", old, re.IGNORECASE):
                raise UserError(f"{flag} {path}: id {number} is {old} in it and {content} in tokenizer_config.json")
            pieces[number] = (content, 0.0, _CONTROL)
    vocabulary = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    apart = {piece for piece, _, kind in pieces if kind in _NOT_TEXT}
    scores = [(piece, score) for piece, score, kind in pieces if piece not in apart]
    merges = generate_merges(vocabulary, scores, skip_tokens=apart)
    made = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for _, _, kind in pieces),
        )
    )
    own = [piece for piece, _, kind in pieces if kind == _USER_DEFINED]
    prefix = normal.add_dummy_prefix
    if prefix and own:  # a fast tokenizer would put a space behind each of them, too
        raise UserError(
            f"{flag} {path}: a space before each text and symbols of its user ({own[0]}); save tokenizer.json with its own "
            "class in transformers"
        )
    # Each text between special tokens gets the space, as the slow classes give each to sentencepiece.
    made.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend(_SPACE)] if prefix else []),
            normalizers.Replace(" ", _SPACE),
        ]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    made.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in own])
    return made, [piece for piece, _, kind in pieces if kind == _CONTROL]


def _of_tiktoken(path: Path, kind: str, flag: str) -> Any:
    """tiktoken's table as a tokenizer of `tokenizers`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if kind not in _ADDED:
        raise UserError(
            f"{flag} {path}: how {kind} splits a text is in its code, which is not run; save tokenizer.json with it in "
            "transformers"
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(f"{flag} {path}:{number}: not a token and its rank; fetch the file again") from None
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=lambda each: ranks[each]):
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in parts if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    pairs = [(text(left), text(right)) for left, right in merges]
    made = Tokenizer(models.BPE(vocabulary, pairs, fuse_unk=False, ignore_merges=True))
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _add_tokens(made: Any, settings: dict[str, Any], kind: str, special: list[str], flag: str, path: Path) -> None:
    """Special tokens: of the vocabulary by name, then those of tokenizer_config.json or of the class behind it."""
    from tokenizers import AddedToken

    made.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special if made.token_to_id(token) is not None]
    )
    listed = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
    if not listed:
        first = made.get_vocab_size()
        listed = {
            first + place: {"content": token, "special": True} for place, token in enumerate(_ADDED.get(kind, ()))
        }
    for number, token in sorted(listed.items()):
        content, known = _text(token), made.token_to_id(_text(token))
        if known is None and number != made.get_vocab_size():
            raise UserError(
                f"{flag} {path}: {content} has id {number} and the vocabulary {made.get_vocab_size()} tokens"
            )
        if known is not None and known != number:
            raise UserError(f"{flag} {path}: {content} has id {known} in it and {number} in tokenizer_config.json")
        added = AddedToken(content, normalized=False, special=bool(token.get("special", True)))
        (made.add_special_tokens if added.special else made.add_tokens)([added])


def _add_ends(made: Any, settings: dict[str, Any], kind: str, named: dict[str, str]) -> None:
    """The begin and end tokens that `add_bos_token` and `add_eos_token` ask for, or the class where they are not there."""
    from tokenizers import processors

    begins = settings.get("add_bos_token", kind in _BEGINNING)
    before = [named["bos_token"]] if begins and "bos_token" in named else []
    after = [named["eos_token"]] if settings.get("add_eos_token") and "eos_token" in named else []
    if before or after:
        single = [*before, "$A", *after]
        made.post_processor = processors.TemplateProcessing(
            single=" ".join(single),
            pair=" ".join([*single, *(re.sub(r"^\$A$", "$B", word) + ":1" for word in single)]),
            special_tokens=[(token, made.token_to_id(token)) for token in {*before, *after}],
        )
