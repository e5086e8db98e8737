"""Published numbers again, by the protocols of their authors."""
