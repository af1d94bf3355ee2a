"""What the five tools share: the checkpoint contract, families, model definitions, training."""
