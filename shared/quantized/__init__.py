"""Quantised weights: the scheme in config.json, and codecs of FP8 blocks, MXFP4 and int4 groups to and from bf16."""
