"""Distillation: what cutting lost comes back by learning from the original."""
