"""Our engine on transformers, and `infer generate` on it, for the models of family_worker.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.cli import invoked
from shared.families import registry
from tools.infer import generate
from tools.infer.engines.engine import EngineSettings, Request
from tools.infer.engines.sampling import Sampling
from tools.infer.engines.transformers import TransformersEngine


def of_engine(source: Path, ids: list[int], tokens: int) -> dict[str, Any]:
    """The greedy continuation of TransformersEngine."""
    engine = TransformersEngine(with_words(source), EngineSettings(engine="hf", precision="fp32"))
    ((_, (found,)),) = engine.generate([Request(prompt=ids, sampling=Sampling(max_tokens=tokens))])
    engine.close()
    return {"tokens": found.tokens, "finish_reason": found.finish_reason}


def of_generate(source: Path, ids: list[int], tokens: int) -> dict[str, Any]:
    """That of `infer generate`, which chooses the engine."""
    prompts, target = source.with_name(f"{source.name}.jsonl"), source.with_name(f"{source.name}.generated")
    prompts.write_text(json.dumps({"prompt": " ".join(f"w{token}" for token in ids)}) + "\n")
    settings = EngineSettings(precision="fp32")
    with invoked("infer", "generate", {}):
        generate.run(
            with_words(source),
            prompts,
            target,
            sampling=Sampling(max_tokens=tokens),
            settings=settings,
            overwrite=False,
        )
    row = json.loads((target / generate.OUTPUT).read_text())
    assert row["prompt_tokens"] == len(ids)
    words = row["completion"].split()
    assert len(words) == row["completion_tokens"]
    return {"tokens": [int(word.removeprefix("w")) for word in words], "finish_reason": row["finish_reason"]}


def with_words(source: Path) -> Path:
    """A copy with a tokenizer: token 5 is the word w5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    copy = source.with_name(f"{source.name}.words")
    if copy.exists():
        return copy
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("manifest.json", "tokenizer*", "*tokens*"))
    size = registry.language_config(read_config(source / "config.json"))["vocab_size"]
    words = {f"w{token}": token for token in range(size)} | {"<unk>": size}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(copy)
    return copy
