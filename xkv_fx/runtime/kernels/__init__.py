"""Kernels of our own for ops that torch runs far below the speed of memory, one file each."""
