"""Benchmarks that anyone can run: `zoo bench ...`."""
