"""Megatron-Core models built from an `Architecture`."""
