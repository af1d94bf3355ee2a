"""Arithmetic with a reference: torch in, torch out, no Megatron-Core."""
