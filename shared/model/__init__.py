"""Model definitions: `architecture` is pure data; the other modules build Megatron-Core models from it."""
