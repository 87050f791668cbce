"""Helpers that tests of this package, and of programs built on it, share."""
