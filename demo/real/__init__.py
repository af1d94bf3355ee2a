"""The demo of a real model. Standard library only, but for `model`."""
