"""The contract between stages: a checkpoint directory, published whole or not at all."""
