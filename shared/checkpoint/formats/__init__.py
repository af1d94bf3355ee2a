"""Checkpoint file formats, read and written without torch or safetensors."""
