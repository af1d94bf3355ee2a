"""Shared by families: config.json fields of a decoder, its tensor table, MoE, MLA, MTP, multimodal wrapper."""
