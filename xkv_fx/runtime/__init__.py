"""Run time: budgeted attention ops, the K/V buffers they mutate, scorers, and sessions that own the buffers."""
