"""Recorded numbers of the original code, kind by kind."""
