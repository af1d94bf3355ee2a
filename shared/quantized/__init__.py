"""Storage codecs of quantised weights, and the quantisation that a config.json declares."""
