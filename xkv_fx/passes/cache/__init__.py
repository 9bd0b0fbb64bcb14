"""Passes that give attentions their caches, and the one that checks the result."""
