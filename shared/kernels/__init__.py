"""Kernels in plain torch, without Megatron-Core."""
