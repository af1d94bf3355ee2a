"""File formats of checkpoints, read and written without their libraries."""
