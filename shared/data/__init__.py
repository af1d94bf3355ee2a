"""Text sources and token files on disk, for every tool that prepares data."""
