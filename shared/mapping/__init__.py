"""The vocabulary in which a family says how its tensors relate to Megatron-Core's."""
