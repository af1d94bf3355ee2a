"""The copy engine: operations on bytes, the worker pool, the journal."""
