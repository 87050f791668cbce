"""Benchmarks: side-by-side measurements within one run; ``bench VERB`` on the command line."""
