"""Core attention: SDPA, eager attention, ALiBi, masks."""
