"""Training engines: DeepSpeed, TRL's trainers."""
