"""Read, check and make checkpoints: their tensors, headers, row order and stored formats."""
