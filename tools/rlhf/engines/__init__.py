"""What owns a model and its optimizer: DeepSpeed, TRL's trainers."""
