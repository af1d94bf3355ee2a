"""What families share: the decoder, its tensor table, config.json readers, MoE, MLA, MTP."""
