"""Passes that bring a captured graph into the form that caches are put into."""
