"""Benchmarks through lm-evaluation-harness: models, tasks, results."""
