"""Rewards: reward models, Python functions, weighted sums."""
