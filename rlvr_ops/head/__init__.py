"""The lm_head: what it is, how it is run, and the log-probabilities that it gives."""
