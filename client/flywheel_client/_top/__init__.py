"""`flywheel top`: shows the metrics of running servers, live in a terminal or once as text or JSON."""
