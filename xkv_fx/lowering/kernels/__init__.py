"""Which kernel serves which call of a decode graph, and why not."""
