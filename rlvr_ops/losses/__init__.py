"""The named losses, each from hidden states and from log-probabilities."""
