"""Thin layers beside weights that stay as they are: solved from calibration rows, or trained."""
