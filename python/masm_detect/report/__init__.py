"""Tables and figures of runs and results."""
