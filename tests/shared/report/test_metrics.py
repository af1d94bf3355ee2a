"""metrics.jsonl of a run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.families import registry
from shared.report.metrics import Metrics, bits_per_byte, flops_per_token, peak_flops, read


def test_a_resumed_run_forgets_what_it_repeats(tmp_path):
    first = Metrics(tmp_path, resumed_step=None)
    for step in range(1, 8):
        first.append(step=step, loss=float(step))
    first.append(step=7, validation_loss=0.5)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a write
    resumed = Metrics(tmp_path, resumed_step=5)
    for step in range(6, 9):
        resumed.append(step=step, loss=10.0 * step)
    resumed.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == [1, 2, 3, 4, 5, 60, 70, 80]
    assert read(tmp_path / "metrics.jsonl") == resumed.rows
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(r["step"], r["loss"]) for r in rows]


def test_a_new_run_starts_its_record_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    Metrics(tmp_path, resumed_step=None).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_record_before_the_first_update_survives_a_resume_at_zero(tmp_path):
    first = Metrics(tmp_path, resumed_step=None)
    first.append(step=0, validation_loss=2.0)
    first.append(step=1, loss=1.0)
    first.close()
    assert Metrics(tmp_path, resumed_step=0).rows == [{"step": 0, "validation_loss": 2.0}]


def test_flops_of_a_known_model():
    """PaLM's accounting for GPT-3-like sizes: 6 N + 12 L H Q T, here with N counted by hand."""
    tiny = registry.from_config(
        {
            "model_type": "llama",
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 10,
            "max_position_embeddings": 32,
        }
    )
    layer = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16 + 2 * 8  # qkv, output, gated MLP, norms
    weights = 2 * layer + 10 * 8 + 8  # with the output matrix, without the input embedding
    assert flops_per_token(tiny, 32) == 6 * weights + 12 * 2 * 8 * 32


def test_flops_of_a_model_whose_table_is_narrower():
    """OPT 350M: the tied table is the output layer's matrix, and both projections are matrices."""
    opt = registry.sizes()["opt-350m"]
    untied = opt.with_values(head={"tied": False})
    assert untied.parameter_count() - opt.parameter_count() == 50_272 * 512
    assert flops_per_token(untied, 128) == flops_per_token(opt, 128)


def test_flops_of_a_model_with_states():
    """By hand: three products with a state of 4 heads, 16 x 12 each, in the first layer; attention in the second."""
    tiny = registry.sizes()["qwen3-next-tiny"]
    matrices = tiny.parameter_count(active=True) - 512 * 64
    assert flops_per_token(tiny, 32) == 6 * matrices + 12 * 4 * 32 * 32 + 6 * 3 * 4 * 16 * 12


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), 4.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1307e12),
        ("CPU", None),
    ],
)
def test_the_peak_is_that_of_the_device_with_all_its_words(device, peak):
    assert peak_flops(device) == peak


def test_the_peak_of_memory_is_this_processs_and_stays():
    """Not its parent's, and not what it has now."""
    program = """
from shared.report.metrics import peak_resident
before = peak_resident()
block = bytearray(b"1") * (256 << 20)
del block
print(before, peak_resident() - before)
"""
    large = bytearray(b"1") * (1 << 30)
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    del large
    before, more = map(int, done.stdout.split())
    assert before < 1 << 30
    assert 250 << 20 < more < 300 << 20
