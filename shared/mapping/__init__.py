"""Tensor mapping between Hugging Face and Megatron-Core: rules, row layouts, TransformerEngine names."""
