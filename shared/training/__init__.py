"""The training loop of pretrain and sft, and what it is made of."""
