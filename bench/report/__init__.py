"""Tables of the documents, from bench/results."""
