"""`pretrain tokenizer`: trains a byte-level BPE tokenizer, published as a Hugging Face tokenizer directory.

Every byte is in the vocabulary: any text round-trips. Pre-tokenisation is LLaMA 3's split pattern: contractions, words with
a leading space, up to three digits, punctuation, line ends, runs of spaces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.publish import publish
from shared.cli import log, progress
from shared.data.sources import expand, pieces, texts
from shared.data.tokenizer import tokenizer_hash
from shared.errors import UserError

# As in the published tokenizer.json of LLaMA 3.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# One token is EOS, end of turn and BOS, as in GPT-2. The model learns to stop from every document.
END = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (END, PAD, *(f"<|{role}|>" for role in ROLES))
BYTES = 256
MINIMUM_VOCAB_SIZE = BYTES + len(SPECIAL_TOKENS)

# A turn: role token, content, end token. The generation block marks the assistant's tokens, end token included, for the loss
# mask.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}{{- message['content'] + '<|endoftext|>' -}}{%- endgeneration -%}
{%- elif message['role'] in ['system', 'user', 'tool'] -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|endoftext|>' -}}
{%- else -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def run(*, source: tuple[Path, ...], target: Path, vocab_size: int, text_key: str, overwrite: bool) -> None:
    """Train a tokenizer on the sources and publish it at `target`.

    Raises:
        UserError: the vocabulary is too small for bytes and special tokens, or a source is unreadable.
    """
    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise UserError(
            f"--vocab-size {vocab_size} is too small: {BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MINIMUM_VOCAB_SIZE}"
        )
    files = expand(source, flag="--source")
    with publish(target, kind="tokenizer", inputs={"source": source}, overwrite=overwrite) as out:
        size = sum(file.stat().st_size for file in files)
        with progress(size, "bytes", "reading") as advance:
            tokenizer = train(_documents(files, text_key, advance), vocab_size)
        write(tokenizer, out.path)
        learnt = tokenizer.get_vocab_size()
        if learnt < vocab_size:
            log(f"the text gave {learnt} tokens only, {vocab_size} were asked for; more text gives more")
        out.describe(
            vocab_size=learnt,
            eos_token_id=tokenizer.token_to_id(END),
            source_bytes=size,
            tokenizer_hash=tokenizer_hash(out.path),
        )
    print(json.dumps({"target": str(target), "vocab_size": learnt}))


def train(documents: Iterator[str], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` of at most `vocab_size` tokens: special tokens, bytes, merges, in this order.

    Deterministic in the documents and their order.
    """
    # Single-threaded word counts make the result independent of the machine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return tokenizer


def write(tokenizer: Any, directory: Path) -> None:
    """Write tokenizer files for `transformers.AutoTokenizer` and vLLM."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,  # no limit; the context length is in the model's config.json
    }
    special = {name: config[name] for name in ("bos_token", "eos_token", "pad_token")}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _documents(files: list[Path], text_key: str, advance: Any) -> Iterator[str]:
    for file in files:
        for piece in pieces(file, 16 << 20):
            yield from texts(piece, text_key)
            advance(piece.end - piece.start)
