"""TRL's log-probabilities are compared with the model's own before the first update."""

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM
from trl.trainer.utils import add_fused_lm_head

from shared.errors import StageError
from tools.rlhf.engines.preference_trainers import check_fused_log_probs


def test_a_family_whose_logits_trl_does_not_know_is_refused():
    """A scale that stands in no field of the configuration when TRL reads it."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CohereForCausalLM(CohereConfig(vocab_size=32, **shape, logit_scale=4.0, pad_token_id=0)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": (ids > 6).long()}
    model.config.logit_scale = 1.0
    add_fused_lm_head(model)
    model.config.logit_scale = 4.0
    with pytest.raises(StageError, match=r"CohereForCausalLM by .* nats a token"):
        check_fused_log_probs(model, batch)
