"""What a loss is: surrogates, ACE, KL, entropy, sampling correction, aggregation."""
