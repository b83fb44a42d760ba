"""A checkpoint: its tensors, headers, row order and stored formats, and the makers of checkpoints."""
