"""Drives a server with load and reports its latencies: `flywheel bench`.

`command` runs the subcommand. `workload` makes the requests, `schedule` says when to send them, `driver` sends them, and
`calls` times each call. `measurements` collects the times, and `report` makes the report from them. `overhead` measures the
bench itself.
`terminal_report`, `html_report` and `comparison` show reports.
"""
