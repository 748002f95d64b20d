"""Shows what the server does: metrics, traces and a log line for each call, all made of the same records of calls."""
