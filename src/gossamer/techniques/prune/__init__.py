"""Techniques that take weights out."""
