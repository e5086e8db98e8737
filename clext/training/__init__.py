"""The training loop and its results: `clext.train`, `clext.compare`."""
