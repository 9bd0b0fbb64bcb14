"""Measuring a model: attention mass, divergence of single layers, divergence of whole plans."""
