"""How much memory a model takes, and what an engine makes of the rest."""
