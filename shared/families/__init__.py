"""Model families: a page of data each, that reads a configuration and lists the tensors."""
