"""Looking at a captured graph: what is where, and what it computes. Nothing here changes a graph's results."""
