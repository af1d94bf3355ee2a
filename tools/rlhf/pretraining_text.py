"""`--pretraining-data` of `rlhf ppo`: text whose likelihood the policy keeps: PPO-ptx (arXiv:2203.02155, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.checkpoint.directory.manifest import MANIFEST
from shared.checkpoint.directory.open import open_checkpoint
from shared.data.document_tokens import DocumentTokens
from shared.data.indexed import IndexedReader
from shared.data.sources import rows_of
from shared.data.tokenizer import tokenizer_hash
from shared.errors import UserError
from tools.rlhf.models import Source

FLAG = "--pretraining-data"
_LENGTH = 512  # tokens, by default; limited by the model's context


@dataclass(frozen=True, kw_only=True)
class PretrainingText:
    """Documents one after another, cut into rows of equal length."""

    ids: npt.NDArray[np.integer]
    """[tokens]."""
    length: int
    """Tokens of a row."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.ids) // self.length

    def rows(self, places: list[int]) -> Tensor:
        """Token ids [places, length] of these rows."""
        cut = [self.ids[place * self.length : (place + 1) * self.length] for place in places]
        return torch.from_numpy(np.stack(cut).astype(np.int64))


def read_pretraining_text(path: Path, source: Source, length: int | None) -> PretrainingText:
    """Rows of a dataset of `pretrain prepare`, or of files of rows with `text`.

    Args:
        path: the dataset, a file or a folder of files.
        source: the policy, whose tokenizer it is.
        length: tokens of a row; by default 512, or the model's context.

    Raises:
        UserError: another tokenizer's dataset, a row without text, a length above the context, or less than one row.
    """
    if length is not None and length > source.context_length:
        raise UserError(f"--pretraining-length {length} is above the model's context of {source.context_length}")
    length = length or min(_LENGTH, source.context_length)
    ids = _prepared(path, source) if (path / MANIFEST).is_file() else _tokenised(path, source.tokenizer)
    if len(ids) < length:
        raise UserError(
            f"{FLAG} {path} has {len(ids)} tokens, fewer than a row of {length}; give more text, or a lower --pretraining-length"
        )
    return PretrainingText(ids=ids, length=length)


def _prepared(path: Path, source: Source) -> npt.NDArray[np.integer]:
    dataset = open_checkpoint(path, kinds=("dataset",), flag=FLAG, verify="sizes")
    if dataset.facts.get("format") != "indexed":
        raise UserError(
            f"{FLAG} {path} holds a {dataset.facts.get('format')} dataset; make one with `pretrain prepare`"
        )
    if dataset.facts["tokenizer_hash"] != tokenizer_hash(source.path):
        raise UserError(
            f"{FLAG} {path} was tokenised with another tokenizer than --source has; prepare it again with `--tokenizer "
            f"{source.path}`"
        )
    return IndexedReader(path / "train", flag=FLAG).ids


def _tokenised(path: Path, tokenizer: Any) -> npt.NDArray[np.integer]:
    around = DocumentTokens.of(tokenizer, None, None)
    begin = [] if around.begin_id is None else [around.begin_id]
    ids: list[int] = []
    for row in rows_of(path, flag=FLAG):
        text = row.value.get("text")
        if not isinstance(text, str):
            raise row.error("no 'text', or none that is a text")
        ids += [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], around.end_id]
    return np.array(ids, dtype=np.int64)
