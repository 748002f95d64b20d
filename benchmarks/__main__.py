"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import embedded

embedded.main()
