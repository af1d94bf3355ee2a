"""Internals of fire, torch, Megatron-Core and transformers that shared relies on, without a model: docs/upstream.md."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import pickle
from pathlib import Path

import fire
import pytest
import torch
from fire.decorators import SetParseFn
from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import MptConfig, MptForCausalLM
from transformers.models.mpt.modeling_mpt import MptModel

from shared.checkpoint.copy.operations import WriteBytes
from shared.checkpoint.dtypes import FP32
from shared.checkpoint.formats import torch_dist_writer, torch_pickle
from shared.checkpoint.formats.pytorch_bin import read_pytorch_bin
from shared.checkpoint.formats.torch_archive import object_archive, tensor_archive
from shared.checkpoint.formats.torch_dist_writer import TorchDistLayout
from shared.families.common.transformers_workarounds import with_workarounds
from shared.mapping.extra_states import _shard
from tests.upstream import relies_on


def test_fire_reads_the_signature_that_a_function_carries() -> None:
    bound = {}

    @SetParseFn(str)
    def binder(**values: str) -> None:
        bound.update(values)

    binder.__signature__ = inspect.Signature([inspect.Parameter("steps", inspect.Parameter.KEYWORD_ONLY, default=None)])
    fire.Fire(binder, command=["--steps=0x10"], name="train")
    assert bound == {"steps": "0x10"}, "re-read _bind of shared/cli.py"
    with pytest.raises(SystemExit):
        fire.Fire(binder, command=["--stops=1"], name="train")


def test_metadata_is_these_classes_and_fields(tmp_path: Path) -> None:
    layout = TorchDistLayout()
    layout.declare("w", FP32, (2, 3))
    layout.add_chunk("w", (0, 0), (2, 3), lambda: [WriteBytes(bytes(24))])
    layout.add_objects(["w._extra_state/shard_0_1"], [None])
    layout.finish(tmp_path, {})
    written = pickle.loads((tmp_path / ".metadata").read_bytes())
    tensor, index = written.state_dict_metadata["w"], metadata.MetadataIndex("w", (0, 0))
    values = (written, tensor, *tensor.chunks, written.storage_data[index], *written.storage_data)
    for value in values:
        fields = {field.name: field for field in dataclasses.fields(value)}
        given = set(vars(value))
        needed = {
            name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING
        }
        assert needed <= given <= set(fields), f"{type(value)}: re-read _metadata of {torch_dist_writer.__name__}"
    assert tensor.properties == metadata.TensorProperties(dtype=torch.float32)
    assert isinstance(written.state_dict_metadata["w._extra_state/shard_0_1"], metadata.BytesStorageMetadata)
    assert isinstance(written.storage_data[index], _StorageInfo)
    read = torch_pickle.read_pickle(pickle.dumps(written), "torch's own")
    assert set(dict(read.state_dict_metadata)) == {"w", "w._extra_state/shard_0_1"}


def test_an_archive_is_a_pickle_and_a_file_for_each_storage(tmp_path: Path) -> None:
    archive = tensor_archive(FP32, (2,))
    data = torch.tensor([1.0, 2.0]).numpy().tobytes()
    loaded = torch.load(io.BytesIO(archive.prefix + data + archive.suffix(0)), weights_only=True)
    assert loaded.tolist() == [1.0, 2.0], "re-read shared/checkpoint/formats/torch_archive.py"
    assert torch.load(io.BytesIO(object_archive({"a": [1, None]})), weights_only=True) == {"a": [1, None]}
    weights = {"w": torch.ones(2, 3), "p": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    found = {
        tensor.name: (tensor.dtype, tensor.shape) for tensor in read_pytorch_bin(tmp_path / "pytorch_model.bin").tensors
    }
    assert found == {"w": ("F32", (2, 3)), "p": ("BF16", (2,))}, "re-read shared/checkpoint/formats/torch_pickle.py"


def test_a_dictionary_of_tensors_forgets_them() -> None:
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
    first, second = torch.zeros(2), torch.zeros(2)
    known[first] = "first"
    assert (first in known, second in known) == (True, False), "re-read shared/kernels/attention/masks.py"
    del first
    assert not len(known)


def test_variable_length_attention_has_a_backward_pass() -> None:
    arguments = torch.ops.torch_attn._varlen_attn_backward.default._schema.arguments
    own = "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state scale window_size"
    assert [argument.name for argument in arguments] == own.split(), "re-read shared/kernels/attention/varlen.py"
    q, lengths = torch.empty(12, 4, 16, device="meta"), torch.empty(3, device="meta", dtype=torch.int32)
    out, lse = varlen_attn(q, q, q, lengths, lengths, 7, 7, return_aux=AuxRequest(lse=True))
    shapes = (out.shape, lse.shape, lse.dtype)
    assert shapes == ((12, 4, 16), (4, 12), torch.float32), "re-read shared/kernels/attention/sinks.py"


def test_a_checkpoint_names_its_format_and_classes(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps(torch_dist_writer._FORMAT))
    config = maybe_load_config(str(tmp_path))
    own = {name: value for name, value in torch_dist_writer._FORMAT.items() if name in vars(config)}
    assert vars(config) == own, f"re-read _FORMAT of {torch_dist_writer.__name__}"
    names = torch_pickle._RECORDS[strategy.__name__]
    assert all(isinstance(getattr(strategy, name), type) for name in names), f"re-read {torch_pickle.__name__}"


def test_extra_states_are_named_by_their_shard() -> None:
    name, place, shape = "decoder.layers.mlp.linear_fc1._extra_state", (1, 0), (4, 2)
    key = ShardedObject(name, None, shape, place).unique_key
    assert key == f"{name}/{_shard([*place], [*shape])}", "re-read shared/mapping/extra_states.py"
    assert ShardedObject(name, None, (1,), (0,)).unique_key == f"{name}/{_shard([], [])}"


def test_mpt_makes_its_alibi_in_a_method() -> None:
    config = MptConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=8, max_seq_len=4, attn_config={"alibi_bias_max": 4})
    model = MptForCausalLM(config)
    plain = model.base_model.build_mpt_alibi_tensor(2, 4)
    assert not torch.equal(with_workarounds(model).base_model.build_mpt_alibi_tensor(2, 4), plain)
    ours = "shared/families/common/transformers_workarounds.py"
    relies_on(ours, MptModel.forward, "self.build_mpt_alibi_tensor(self.num_heads, self.config.max_seq_len, "
        "device=hidden_states.device)")  # fmt: skip
