"""Tiny random models that vLLM runs on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog. def f(x): return x + 1\n"


def tiny_model(family: str, path: Path, *, head_dim: int = 32, **changes: Any) -> Path:
    """Write a model with a tokenizer at `path`. LLaMA's tokenizer has a chat template, the others' have none.

    head_dim 32 is the smallest of vLLM's CPU attention. Weights have a large deviation, so that the most likely token
    leads by far and rounding does not change greedy decoding. `changes`: other fields of config.json.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # ASCII only: no token is part of a character, so that equal texts are equal tokens.
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii() or c in "\u0120\u010a"]
    bpe.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=140, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    if family == "llama":
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": None,
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
