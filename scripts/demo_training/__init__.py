"""Makes the demo checkpoint: its data, its tokenizer, its training. ``scripts/train_demo`` runs it."""
