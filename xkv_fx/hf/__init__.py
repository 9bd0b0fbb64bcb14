"""Everything that knows transformers: capture, generation, and the models that a name stands for."""
