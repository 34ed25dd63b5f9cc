"""Training, once: a thin layer over `transformers.Trainer` with a list of weighted objectives."""
