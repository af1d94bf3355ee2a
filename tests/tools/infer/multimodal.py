"""Tiny multimodal models: image processor, and log-probabilities after an image in transformers and vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TOKENS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<boi>": 3, "<eoi>": 4, "<image>": 5, "<unk>": 6}
TOKENS |= {"\n" * count: 6 + count for count in (1, 2, 3, 4)}  # vLLM looks them up
_ROLES = {"boi_token_index": "<boi>", "eoi_token_index": "<eoi>", "image_token_index": "<image>"}
_BEHIND = 12
_PROMPT = " ".join(["t20 t21 <boi>", *(f"t{30 + 7 * place}" for place in range(_BEHIND))])


def write_processor(source: Path) -> int:
    """Write a tokenizer, whose first ids are the special tokens, and an image processor. Returns the length of a prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    config = json.loads((source / "config.json").read_text())
    config |= {role: TOKENS[token] for role, token in _ROLES.items()}
    (source / "config.json").write_text(json.dumps(config))
    words = {f"t{place}": place for place in range(len(TOKENS), config["text_config"]["vocab_size"])}
    plain = Tokenizer(models.WordLevel(TOKENS | words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        **{f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk")},
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    )
    pixels, image_tokens = config["vision_config"]["image_size"], config["mm_tokens_per_image"]
    image = Gemma3ImageProcessor(size={"height": pixels, "width": pixels})
    Gemma3Processor(image, tokenizer, image_seq_length=image_tokens).save_pretrained(source)
    return image_tokens + _BEHIND + 8


def _image(source: Path) -> Any:
    from PIL import Image

    pixels = json.loads((source / "config.json").read_text())["vision_config"]["image_size"]
    numbers = torch.randint(256, (pixels, pixels, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(numbers.numpy())


def of_transformers(source: Path, blank: bool = False) -> list[float]:
    """Log-probabilities of the tokens behind an image; `blank`: of one whose pixels are all zero.

    With causal attention within the image, as vLLM has it on CPU.
    """
    from transformers import AutoModelForImageTextToText, Gemma3Processor

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    given = dict(Gemma3Processor.from_pretrained(source)(text=_PROMPT, images=[_image(source)], return_tensors="pt"))
    given["pixel_values"] = given["pixel_values"] * (not blank)
    given["token_type_ids"] = torch.zeros_like(given["token_type_ids"])
    with torch.no_grad():
        logits = model(**given).logits[0, -_BEHIND - 1 : -1]
    known = logits.log_softmax(-1).gather(-1, given["input_ids"][0, -_BEHIND:, None])
    return known[:, 0].tolist()


def of_vllm(llm: Any, source: Path, sampling: Any) -> list[float]:
    """The same in vLLM."""
    prompt = {"prompt": _PROMPT, "multi_modal_data": {"image": _image(source)}}
    (answer,) = llm.generate([prompt], sampling, use_tqdm=False)
    behind = zip(answer.prompt_logprobs[-_BEHIND:], answer.prompt_token_ids[-_BEHIND:], strict=True)
    return [position[token].logprob for position, token in behind]
