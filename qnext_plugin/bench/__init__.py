"""Measure the speed of a served model, in turn with another model, and compare it with the machine's limits."""
