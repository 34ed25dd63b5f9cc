"""Fewer bits: codes for weights, 8-bit grids for inputs, 16-bit casts."""
