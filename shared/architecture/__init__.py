"""Model configuration as frozen dataclasses, importable without torch."""
