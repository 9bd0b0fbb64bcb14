"""Passes that make graphs which measure: scores, statistics, single layers."""
