"""Which causal language models are taken."""
