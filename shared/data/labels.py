"""Labels of a language model: the token that follows, or none."""

IGNORE = -100  # a label without loss; the default of torch's cross_entropy(ignore_index=)
