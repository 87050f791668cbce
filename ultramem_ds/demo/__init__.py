"""The demo: from the Python standard library's text to three trained models."""
