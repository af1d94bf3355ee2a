"""Checkpoint directories: the contract between tools, the file formats, the copy engine (docs/contract.md)."""
