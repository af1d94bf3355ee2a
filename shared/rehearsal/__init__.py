"""Rehearsal of a training run without its GPUs: a CUDA runtime of stubs, a fake world, and what a rank did in it."""
