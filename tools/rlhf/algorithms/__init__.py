"""Losses and training loops: PPO, GRPO, reward models."""
