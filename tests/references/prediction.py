"""Multi-token prediction (MTP) in plain torch, with transformers' decoder layers; transformers itself ignores MTP.

DeepSeek V3 (arXiv:2412.19437), section 2.2: `h' = M [norm(h) ; norm(embedding of the next token)]`, a decoder layer, a norm,
the model's head. Published weights differ in two points: the embedding's half of M is first, and h is the output of the final
norm. Source: `deepseek_mtp.py`, `glm4_moe_mtp.py` and `qwen3_next_mtp.py` of vLLM 0.32
(`torch.cat([inputs_embeds, previous_hidden_states], dim=-1)`; the model returns `self.norm(hidden_states, residual)`). The
first two also zero the embedding at position 0; the paper, Megatron-Core and this module do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_INNER = "mtp.layers.0."  # Qwen's name of the layer within
_NAMES = {  # of the parts around it: DeepSeek's and GLM's, and Qwen's
    "embedding_norm": ("enorm", "mtp.pre_fc_norm_embedding"),
    "hidden_norm": ("hnorm", "mtp.pre_fc_norm_hidden"),
    "projection": ("eh_proj", "mtp.fc"),
    "norm": ("shared_head.norm", "mtp.norm"),
}


class Predicting:
    """A model of transformers with one such layer, which transformers reads as an ordinary layer behind the last."""

    def __init__(self, source: Path, work: Path) -> None:
        """`work` is a new folder for the files that transformers is given to read."""
        from transformers import AutoModelForCausalLM

        config = json.loads((source / "config.json").read_text())
        tensors = load_file(source / "model.safetensors")
        self.layers = config["num_hidden_layers"]
        self.inner = f"model.layers.{self.layers}."
        self.of_qwen = any(name.startswith(_INNER) for name in tensors)
        work.mkdir()
        named = {name.replace(_INNER, self.inner): tensor for name, tensor in tensors.items()}
        save_file(named, work / "model.safetensors", {"format": "pt"})
        further = {"num_hidden_layers": self.layers + 1}
        if "layer_types" in config:
            further["layer_types"] = [*config["layer_types"], "full_attention"]
        (work / "config.json").write_text(json.dumps(config | further))
        read = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.model = AutoModelForCausalLM.from_pretrained(work, **read).eval()
        self.parameters = dict(self.model.named_parameters())
        body = self.model.model
        self.every, self.last_norm = list(body.layers), body.norm
        kinds = getattr(self.model.config, "layer_types", None)
        self.kinds = list(kinds) if kinds else None
        self.own: dict[str, torch.nn.Module] = {}
        for part, names in _NAMES.items():
            name = names[1] if self.of_qwen else self.inner + names[0]
            weight = tensors[f"{name}.weight"]
            if part == "projection":
                module: Any = torch.nn.Linear(*weight.shape[::-1], bias=False)
            else:
                module = type(body.norm)(len(weight), eps=config["rms_norm_eps"])
            module.weight.data = weight.float()
            self.own[part] = module
            self.parameters[f"{name}.weight"] = module.weight

    def _through(self, layers: list[Any], kinds: list[str] | None, norm: torch.nn.Module, **given: Any) -> torch.Tensor:
        """These layers and the norm, with transformers' masks and rotation."""
        body = self.model.model
        body.layers, body.norm = torch.nn.ModuleList(layers), norm
        self.model.config.num_hidden_layers = len(layers)
        if kinds:
            self.model.config.layer_types = kinds
        hidden: torch.Tensor = body(**given, use_cache=False).last_hidden_state
        return hidden

    def logits(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, sequence]` to logits of the next tokens, and of those after them: `[batch, sequence - 1, vocabulary]`."""
        main = self.kinds[:-1] if self.kinds else None
        hidden = self._through(self.every[:-1], main, self.last_norm, input_ids=ids)
        embedded = self.model.model.embed_tokens(ids)[:, 1:]
        both = [self.own["embedding_norm"](embedded), self.own["hidden_norm"](hidden[:, :-1])]
        combined = self.own["projection"](torch.cat(both, -1))
        kinds = self.kinds[-1:] if self.kinds else None
        further = self._through(self.every[-1:], kinds, self.own["norm"], inputs_embeds=combined)
        return self.model.lm_head(hidden), self.model.lm_head(further)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of every parameter that has one, under the names that files have."""
        from transformers.core_model_loading import revert_weight_conversion

        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        found = revert_weight_conversion(self.model, found)
        return {name.replace(self.inner, _INNER) if self.of_qwen else name: grad for name, grad in found.items()}
