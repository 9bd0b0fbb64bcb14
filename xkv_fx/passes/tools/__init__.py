"""What passes are written with: editing a graph, adding functions to it, asking what depends on what."""
