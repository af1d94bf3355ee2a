"""Labels of a language model: the next token, or IGNORE."""

IGNORE = -100  # a label without loss; the default of torch's cross_entropy(ignore_index=)
