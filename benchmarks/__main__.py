"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import embedded, modal

embedded.main()
modal.main()
