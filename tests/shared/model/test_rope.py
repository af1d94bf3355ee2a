import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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
