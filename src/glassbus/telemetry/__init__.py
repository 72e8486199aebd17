"""Shows what happened: traces and metrics as two projections of the facts."""
