"""Compile time: passes over a captured `torch.fx` graph. One pass a file; `pipeline.py` has their order."""
