"""What a model is: pure data, importable without torch."""
