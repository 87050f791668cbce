"""Small helpers without a better home: atomic files."""
