"""torch.save files against torch: every tensor is located, no code of the pickle runs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.checkpoint.formats.pytorch_bin import read_pytorch_bin
from shared.errors import UserError


def save(path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def data(path: Path) -> dict[str, bytes]:
    """The bytes that the found places hold."""
    content = path.read_bytes()
    return {t.name: content[t.start : t.start + t.size] for t in read_pytorch_bin(path).tensors}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
    ],
)
def test_every_tensor_is_where_torch_put_it(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    tensors = {f"t{i}": torch.randint(0, 2, (3, 5 + i)).to(dtype) for i in range(4)}
    path = save(tmp_path / "w.bin", tensors)
    found = read_pytorch_bin(path).tensors
    assert [(t.name, t.dtype, t.shape) for t in found] == [(n, name, tuple(t.shape)) for n, t in tensors.items()]
    assert data(path) == {n: raw(t) for n, t in tensors.items()}


def test_a_module_of_parameters_and_tied_tensors(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"in": torch.nn.Embedding(7, 4), "out": torch.nn.Linear(4, 7, bias=False)})
    module["out"].weight = module["in"].weight
    path = save(tmp_path / "w.bin", module.state_dict())
    weight = raw(module["in"].weight.detach())
    assert data(path) == {"in.weight": weight, "out.weight": weight}
    parameters = save(tmp_path / "p.bin", dict(module.named_parameters()))
    assert data(parameters) == {"in.weight": weight}


def test_part_of_a_larger_storage(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(6, 4)
    path = save(tmp_path / "w.bin", {"rows": whole[2:4], "one": whole[5:6, :]})
    assert data(path) == {"rows": raw(whole[2:4]), "one": raw(whole[5:6])}


def test_a_transposed_tensor_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "w.bin", {"fine": torch.zeros(2), "turned": torch.zeros(2, 3).T})
    with pytest.raises(UserError, match="turned is not stored contiguously"):
        read_pytorch_bin(path)


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = save(tmp_path / "w.bin", {"a": torch.zeros(2), "b": Runs(tmp_path / "proof")})
    with pytest.raises(UserError, match=r"exec, which is not allowed in a weight checkpoint; it was not executed"):
        read_pytorch_bin(path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"epoch": 3}, "epoch is not a plain tensor"),
        ({"state": {"w": torch.zeros(2)}}, "state is not a plain tensor"),
        ([torch.zeros(2)], "is not a state dict"),
        ({"c": torch.zeros(2, dtype=torch.complex64)}, "names torch.ComplexFloatStorage"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_pytorch_bin(save(tmp_path / "w.bin", content))


def test_old_and_damaged_files(tmp_path: Path) -> None:
    old = save(tmp_path / "old.bin", {"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="torch before 1.6"):
        read_pytorch_bin(old)
    whole = save(tmp_path / "w.bin", {"a": torch.zeros(4000)}).read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:9000])
    with pytest.raises(UserError, match=r"cut.bin is truncated"):
        read_pytorch_bin(tmp_path / "cut.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty.bin is truncated"):
        read_pytorch_bin(tmp_path / "empty.bin")


def test_a_storage_shorter_than_its_tensor(tmp_path: Path) -> None:
    source = zipfile.ZipFile(io.BytesIO(save(tmp_path / "w.bin", {"a": torch.zeros(64)}).read_bytes()))
    with zipfile.ZipFile(tmp_path / "short.bin", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[:100] if name.endswith("data/0") else content)
    with pytest.raises(UserError, match="a is truncated"):
        read_pytorch_bin(tmp_path / "short.bin")
