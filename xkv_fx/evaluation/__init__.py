"""Measuring plans: texts, tasks and metrics. Drives the public face only."""
