"""Training examples on disk and where they come from."""
