"""Ahead-of-time engines: a folder that generates without transformers, the model's code, or a compiler."""
