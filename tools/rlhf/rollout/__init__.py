"""Replies sampled from a policy."""
