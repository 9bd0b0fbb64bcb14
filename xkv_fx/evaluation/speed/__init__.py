"""How fast it is: benches against other caches and other engines."""
