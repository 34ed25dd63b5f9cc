"""What can be done to a model: one folder a family, one file a technique; `registry` finds them."""
