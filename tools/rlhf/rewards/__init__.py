"""Rewards of replies: reward models, Python functions, their weighted sum."""
