"""Decode speed beside peers, measured in one run: see `python -m benchmarks.run --help`."""
