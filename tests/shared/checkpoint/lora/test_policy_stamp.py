"""The stamp of a published adapter, in the header that the safetensors library writes."""

import torch
from safetensors.torch import save_file

from shared.checkpoint.formats.safetensors_file import read_header
from shared.checkpoint.lora.policy_stamp import PolicyStamp


def test_a_stamp_is_read_from_the_file_that_it_was_written_to(tmp_path):
    stamp, path = PolicyStamp(version="run-3", base="ab"), tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"} | stamp.metadata())
    assert PolicyStamp.of(read_header(path).metadata) == stamp


def test_a_file_of_another_writer_has_none(tmp_path):
    assert PolicyStamp.of(None) is None
    stamp = PolicyStamp(version="run-3", base="ab").metadata()
    for name in stamp:
        assert PolicyStamp.of({key: value for key, value in stamp.items() if key != name}) is None
