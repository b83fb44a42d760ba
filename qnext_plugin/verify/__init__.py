"""Compare a served model with a reference: the scenarios, their runner and the comparison."""
