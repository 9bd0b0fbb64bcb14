"""Ahead of time: from prompts to curves, and from curves to a plan. Solving is pure: arrays in, capacities out."""
