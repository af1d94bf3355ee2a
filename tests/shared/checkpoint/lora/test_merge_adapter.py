"""`W + scale * B @ A` against rational arithmetic: correctly rounded on every processor."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import view_of
from shared.checkpoint.dtypes import BF16, FP16, FP32, Dtype, from_float32, to_float64
from shared.checkpoint.formats.safetensors_file import read_header
from shared.checkpoint.lora.merge_adapter import Delta, Matrix, merged

ROOT = Path(__file__).resolve().parents[4]
SCALE = 12 / 7
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=lambda dtype: dtype.name)


def merge(
    path: Path,
    w: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    dtype: Dtype,
    *,
    transposed: bool = False,
    scale: float = SCALE,
) -> bytes:
    """`w` is rounded to the dtype; bytes of the merged matrix."""
    save_file({"w": w, "a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}, path)
    tensors = {tensor.name: tensor for tensor in read_header(path).tensors}
    base = Matrix(view=view_of(tensors["w"]), stored=FP32, dtype=dtype)
    delta = Delta(a=tensors["a"], b=tensors["b"], rank=len(a), scale=scale, transposed=transposed)
    written = b""
    with OpenFiles() as files:
        for operation in merged(base, delta):
            out = memoryview(bytearray(operation.size))
            operation.fill(files, out)
            written += out
    return written


def nearest(exact: Fraction, dtype: Dtype) -> float:
    """The number of the dtype that is nearest, of two the one with an even last bit. Normal numbers only."""
    if not exact:
        return 0.0
    bits = {FP32: 24, BF16: 8, FP16: 11}[dtype]
    exponent = -200
    while abs(exact) >= Fraction(2) ** exponent:
        exponent += 1
    ulp = Fraction(2) ** (exponent - bits)
    return float(round(exact / ulp) * ulp)  # Python rounds half to even


def exactly(w: np.ndarray, a: np.ndarray, b: np.ndarray, dtype: Dtype, scale: float = SCALE) -> np.ndarray:
    w = to_float64(from_float32(w.reshape(-1), dtype), dtype).reshape(w.shape)
    base, left, right = ([[Fraction(float(x)) for x in row] for row in matrix] for matrix in (w, b, a.T))
    sums = [
        [w_ij + Fraction(scale) * sum(map(Fraction.__mul__, b_i, a_j)) for w_ij, a_j in zip(w_i, right, strict=True)]
        for w_i, b_i in zip(base, left, strict=True)
    ]
    return np.array([[nearest(exact, dtype) for exact in row] for row in sums])


def matrices(rows: int, columns: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    w, a, b = (random.standard_normal(shape, np.float32) for shape in ((rows, columns), (rank, columns), (rows, rank)))
    return w, a, b


@DTYPES
@pytest.mark.parametrize("transposed", [False, True])
def test_every_number_is_the_exact_one_rounded_once(tmp_path: Path, dtype: Dtype, transposed: bool) -> None:
    w, a, b = matrices(20, 30, 8)
    wanted = exactly(w, a, b, dtype)
    found = merge(tmp_path / "x", np.ascontiguousarray(w.T if transposed else w), a, b, dtype, transposed=transposed)
    made = to_float64(memoryview(found), dtype).reshape((30, 20) if transposed else (20, 30))
    assert np.array_equal(made.T if transposed else made, wanted)


@DTYPES
def test_numbers_that_float64_cannot_decide_are_exact_too(tmp_path: Path, dtype: Dtype) -> None:
    """Products that cancel down to 2^-60 beside a tie between two numbers of the dtype: float64 loses what decides."""
    half = 2.0 ** -{FP32: 24, BF16: 8, FP16: 11}[dtype]  # of the ulp of 1
    rows = [
        (half, 2.0**-60),
        (half, -(2.0**-60)),
        (3 * half, 2.0**-60),
        (3 * half, -(2.0**-60)),
        (half, 0),
        (3 * half, 0),
    ]
    w = np.ones((len(rows), 1), np.float32)
    b = np.array([[x, y, 3.0, -3.0] for x, y in rows], np.float32)
    a = np.array([[1], [1], [0.1], [0.1]], np.float32)
    made = to_float64(memoryview(merge(tmp_path / "x", w, a, b, dtype, scale=1.0)), dtype)
    wanted = [1 + 2 * half, 1, 1 + 4 * half, 1 + 2 * half, 1, 1 + 4 * half]
    assert made.tolist() == wanted
    assert exactly(w, a, b, dtype, scale=1.0).reshape(-1).tolist() == wanted


@DTYPES
def test_an_adapter_of_zeros_leaves_the_base(tmp_path: Path, dtype: Dtype) -> None:
    w, a, b = matrices(20, 30, 8)
    w[:, :5] = 0
    made = merge(tmp_path / "x", w, a, 0 * b, dtype)
    assert made == bytes(from_float32(w.reshape(-1), dtype))


WORKER = """
import sys
from pathlib import Path
from tests.shared.checkpoint.lora import test_merge_adapter as test
for dtype in (test.FP32, test.BF16, test.FP16):
    print(test.hashlib.sha256(test.merge(Path(sys.argv[1]), *test.matrices(500, 700, 48), dtype)).hexdigest())
"""


def test_every_kernel_of_openblas_gives_the_same_bits(tmp_path: Path) -> None:
    """Kernels add in different orders: `OPENBLAS_CORETYPE` chooses the one of another processor."""
    plain = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    answers = set()
    for kernel in (None, "Haswell", "Prescott"):
        environment = plain | ({"OPENBLAS_CORETYPE": kernel} if kernel else {})
        words = [sys.executable, "-c", WORKER, str(tmp_path / "x")]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers.add(done.stdout)
    assert len(answers) == 1
    expected = [merge(tmp_path / "x", *matrices(500, 700, 48), dtype) for dtype in (FP32, BF16, FP16)]
    assert answers == {"".join(f"{hashlib.sha256(made).hexdigest()}\n" for made in expected)}
