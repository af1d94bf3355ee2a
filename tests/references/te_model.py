"""A language model of TransformerEngine layers, built from a directory of kind te only.

`layers.json` has the modules' arguments, the safetensors files the weights, loaded strictly. The caller chooses the layer
classes: TransformerEngine's, or those of `transformer_engine.py` in this folder.
"""

import json

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


def described(directory):
    return json.loads((directory / "layers.json").read_text())


def weights(directory):
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def under(state, path):
    return {name.removeprefix(f"{path}."): tensor for name, tensor in state.items() if name.startswith(f"{path}.")}


def arguments(layer):
    """Of a layer's class; TransformerEngine takes a window as a tuple, which JSON does not have."""
    found = dict(layer["arguments"])
    if found["window_size"]:
        found["window_size"] = tuple(found["window_size"])
    return found


def angles(rotary, positions):
    """`[positions, 1, 1, dim]` in radians."""
    assert rotary["scaling"] is None
    exponents = torch.arange(0, rotary["dim"], 2, dtype=torch.float64) / rotary["dim"]
    each = torch.arange(positions)[:, None] * rotary["theta"] ** -exponents
    both = each.repeat_interleave(2, -1) if rotary["interleaved"] else torch.cat([each, each], -1)
    return both[:, None, None].float()


def norm(part, state, x):
    class_name, given = part["class"].rpartition(".")[2], part["arguments"]
    weight = state["weight"] + 1 if given["zero_centered_gamma"] else state["weight"]
    if class_name == "LayerNorm":
        return functional.layer_norm(x, x.shape[-1:], weight, state["bias"], given["eps"])
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + given["eps"]) * weight


class Model(nn.Module):
    """Every layer of it a TransformerLayer; `layer_class` makes them."""

    def __init__(self, directory, layer_class, description=None):
        super().__init__()
        self.description = description or described(directory)
        self.state = weights(directory)
        self.layers = nn.ModuleList(layer_class(**arguments(layer)) for layer in self.description["layers"])
        for index, layer in enumerate(self.layers):
            layer.load_state_dict(under(self.state, f"layers.{index}"), strict=True)

    @torch.no_grad()
    def forward(self, ids):
        """`[batch, positions]` to logits `[batch, positions, vocabulary]`."""
        a, ends, state = self.description["architecture"], self.description["ends"], self.state
        embedding, head = a["embedding"], a["head"]
        x = functional.embedding(ids.T, state["embedding.weight"]) * embedding["multiplier"]
        if "position_embedding" in ends:
            table = state["position_embedding.weight"][embedding["positions"]["offset"] :]
            x = x + table[: len(x), None]
        if "embedding_norm" in ends:
            x = norm(ends["embedding_norm"], under(state, "embedding_norm"), x)
        for layer, how in zip(self.layers, self.description["layers"], strict=True):
            call = dict(how["call"])
            if "rotary_pos_emb" in call:
                call["rotary_pos_emb"] = angles(call["rotary_pos_emb"], len(x)).to(x.device)
            x = layer(x, **call)
        x = norm(ends["final_norm"], under(state, "final_norm"), x)
        weight = state[ends["output_layer"].get("tied_to", "output_layer.weight")]
        weight = functional.normalize(weight) if head["normalized"] else weight
        logits = functional.linear(x, weight, state.get("output_layer.bias")) * head["multiplier"]
        if cap := head["softcap"]:
            logits = cap * torch.tanh(logits / cap)
        return logits.transpose(0, 1)
