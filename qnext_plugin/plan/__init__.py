"""Compute how much memory a model takes, and how an engine uses the rest."""
