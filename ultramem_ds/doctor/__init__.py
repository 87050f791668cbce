"""Checks of the environment, and what to do about what they find."""
