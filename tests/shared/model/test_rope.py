import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Olmo3Config, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from shared.architecture.architecture import RopeScaling, Rotary
from shared.families.common.fields import Fields
from shared.kernels.rotary import cos_sin
from shared.model.rope import RotaryAngles, concentration_factor, inverse_frequencies
from shared.runtime.device import select_device


def test_plain_frequencies_are_transformers():
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    assert torch.equal(inverse_frequencies(Rotary(), 32), LlamaRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"rope_type": "linear", "factor": 3.0}, RopeScaling(kind="linear", factor=3.0)),
        (
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            RopeScaling(kind="llama3", factor=8.0),
        ),
        (
            {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0,
                "original_max_position_embeddings": 2048,
            },
            RopeScaling(
                kind="llama3", factor=32.0, low_frequency_factor=2.0, high_frequency_factor=8.0, original_length=2048
            ),
        ),
    ],
)  # fmt: skip
def test_scaled_frequencies_are_transformers(theirs, ours):
    found = inverse_frequencies(Rotary(theta=5e5, scaling=ours), 128)
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters={**theirs, "rope_theta": 5e5}
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    assert attention_factor == 1.0
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)  # last bits of fp32
    unscaled = inverse_frequencies(Rotary(theta=5e5), 128)
    assert not torch.equal(expected, unscaled)


@pytest.mark.parametrize("theta", [1e4, 1.5e5])
@pytest.mark.parametrize(
    "theirs",
    [
        {"factor": 4.0, "original_max_position_embeddings": 32_768},  # Qwen 2.5
        {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},  # gpt-oss
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},  # DeepSeek V3
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
        {"factor": 8.0, "original_max_position_embeddings": 2048, "attention_factor": 1.75},
        {"factor": 32.0, "original_max_position_embeddings": 4, "truncate": False},  # no pair turns so often
    ],
)
def test_yarn_is_transformers(theirs, theta):
    scaling = Fields({"rope_scaling": {"rope_type": "yarn", **theirs}}).rope(theta, 131_072)[1]
    rotary = Rotary(theta=theta, scaling=scaling)
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "yarn", "rope_theta": theta, **theirs},
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(rotary, 64), expected, atol=0, rtol=1e-6)
    assert concentration_factor(rotary) == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "rotary"),
    [
        (
            Gemma3TextConfig(
                hidden_size=256, num_attention_heads=4, head_dim=64, num_hidden_layers=6, rope_theta=1e6,
                rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 8.0},
            ),
            Gemma3RotaryEmbedding,
        ),
        (
            Olmo3Config(
                hidden_size=256, num_attention_heads=4, num_hidden_layers=6, max_position_embeddings=65_536,
                rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
            ),
            Olmo3RotaryEmbedding,
        ),
    ],
    ids=["gemma3", "olmo3"],
)  # fmt: skip
def test_layers_with_a_window_have_their_own_frequencies(config, rotary):
    theta, scaling, own = Fields(config.to_dict()).rope_by_kind(1.0, config.max_position_embeddings)
    full, windowed = Rotary(theta=theta, scaling=scaling), Rotary(theta=own)
    theirs = rotary(config)
    for ours, kind in ((full, "full_attention"), (windowed, "sliding_attention")):
        ours = inverse_frequencies(ours, 64)
        torch.testing.assert_close(ours, getattr(theirs, f"{kind}_inv_freq"), atol=0, rtol=1e-6)
    assert scaling is not None
    assert not torch.equal(inverse_frequencies(full, 64), inverse_frequencies(windowed, 64))


@pytest.mark.parametrize("further", [{}, {"attention_factor": 1.25}, {"factor": 7.0}, {"type": "longrope"}])
@pytest.mark.parametrize("length", [1, 256, 257, 4096])
def test_longrope_is_transformers_on_both_sides_of_the_original_length(further, length):
    factors = {"short_factor": [1.0 + i / 16 for i in range(12)], "long_factor": [1.5 + i for i in range(12)]}
    plain = {"max_position_embeddings": 4096, "original_max_position_embeddings": 256, "rope_theta": 2e4}
    given = {**plain, "partial_rotary_factor": 0.75, "rope_scaling": {"rope_type": "longrope", **factors, **further}}
    theta, scaling = Fields(given).rope(1e4, 4096, partial=True)
    rotary = Rotary(theta=theta, scaling=scaling, dim=24)
    theirs = Phi3RotaryEmbedding(Phi3Config(hidden_size=128, num_attention_heads=4, **given))
    select_device()
    cosines, sines = theirs(torch.zeros(1), torch.arange(length)[None])
    angles = RotaryAngles(rotary, 24, 4096)(length)[:, 0, 0]
    # Angles grow to thousands of radians, of which fp32 keeps four decimals.
    torch.testing.assert_close(angles.cos() * scaling.concentration_factor, cosines[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(angles.sin() * scaling.concentration_factor, sines[0], atol=1e-5, rtol=0)
    short = inverse_frequencies(rotary, 24, length=256)
    assert torch.equal(inverse_frequencies(rotary, 24, length=length), short) == (length <= 256)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("length", [1, 512, 513, 2000])
def test_dynamic_is_transformers_on_both_sides_of_the_longest_sequence(factor, length):
    given = {"rope_type": "dynamic", "factor": factor}
    rotary = Rotary(theta=1e6, scaling=RopeScaling(kind="dynamic", factor=factor))
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={**given, "rope_theta": 1e6},
    )
    expected, concentration_factor = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=length)
    assert concentration_factor == 1.0
    found = inverse_frequencies(rotary, 32, length=length, max_position_embeddings=512)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert torch.equal(found, inverse_frequencies(Rotary(theta=1e6), 32)) == (length <= 512)


def test_cos_and_sin_are_made_once_for_all_layers_and_micro_batches(monkeypatch):
    rotary = Rotary(scaling=RopeScaling(kind="yarn", factor=4.0, original_length=64))
    select_device()
    angles, made = RotaryAngles(rotary, 8, 256), []
    monkeypatch.setattr("shared.model.rope.cos_sin", lambda *given: made.append(given) or cos_sin(*given))
    first, second = angles.tables(48, torch.float32), angles.tables(48, torch.float32)
    assert first is second
    assert len(made) == 1
    assert torch.equal(first[0], angles(48).cos() * concentration_factor(rotary))
    assert concentration_factor(rotary) != 1.0
    assert [each.shape[0] for each in angles.tables(32, torch.bfloat16)] == [32, 32]
    assert angles.tables(48, torch.bfloat16)[1].dtype == torch.bfloat16
    assert len(made) == 3
