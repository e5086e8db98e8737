"""Data sets, and scenarios: the sequences of tasks that are made of them."""
