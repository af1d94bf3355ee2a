import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shared.families.fields import Fields
from shared.model.architecture import RopeScaling
from shared.model.rope import inverse_frequencies


def test_plain_frequencies_are_transformers(worker):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    assert torch.equal(inverse_frequencies(worker.architecture()), LlamaRotaryEmbedding(config).inv_freq)


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
def test_scaled_frequencies_are_transformers(theirs, ours, worker):
    architecture = worker.architecture(head_dim=128, rope_theta=5e5, rope_scaling=ours)
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters={**theirs, "rope_theta": 5e5}
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    assert attention_factor == 1.0
    torch.testing.assert_close(inverse_frequencies(architecture), expected, atol=0, rtol=1e-6)  # last bits of fp32
    unscaled = inverse_frequencies(worker.architecture(head_dim=128, rope_theta=5e5))
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
def test_yarn_is_transformers(theirs, theta, worker):
    scaling = Fields({"rope_scaling": {"rope_type": "yarn", **theirs}}).rope(theta, 131_072)[1]
    architecture = worker.architecture(head_dim=64, rope_theta=theta, rope_scaling=scaling)
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "yarn", "rope_theta": theta, **theirs},
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(architecture), expected, atol=0, rtol=1e-6)
    assert scaling.amplitude == pytest.approx(attention_factor, rel=1e-12)
