"""Text and tokens on disk: sources in, token files out. Used by every tool that prepares data."""
