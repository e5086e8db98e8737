"""The ground that every other folder stands on: checks, seeds, modes, lists of tensors."""
