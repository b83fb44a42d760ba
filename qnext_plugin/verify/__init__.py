"""Hold a served model against a reference: scenarios, their runner and the comparison."""
