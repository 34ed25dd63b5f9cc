"""Make large models small and fast, and prove it."""
