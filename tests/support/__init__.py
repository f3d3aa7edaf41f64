"""Helpers that tests, demo and benchmarks share: real servers and real processes."""
