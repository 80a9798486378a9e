"""Checkpoint conversion: one table of rules per network, shared by `packforcing convert` and `packforcing verify`."""
