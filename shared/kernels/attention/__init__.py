"""The attention product."""
