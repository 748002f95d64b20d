"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import embedded, modal, modal_requests

embedded.main()
modal.main()
modal_requests.main()
