"""Adapters to frameworks that drive the training loop; each imports its own framework alone."""
