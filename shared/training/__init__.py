"""The training loop of pretrain and sft, and its parts."""
