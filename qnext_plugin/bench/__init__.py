"""Speed of a served model, measured in turn against another, with what the machine allows at the most."""
