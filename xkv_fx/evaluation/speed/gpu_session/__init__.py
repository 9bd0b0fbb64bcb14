"""A short session on a GPU: everything that must be known of one, in stages ordered by worth."""
