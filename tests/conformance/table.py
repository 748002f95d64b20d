"""Prints the results of `test_fields.py` as a table: a plugin of pytest, for `make conformance`."""

from collections import defaultdict
from collections.abc import Mapping

import pytest

FAILED = "FAILED"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints a row for each field, with a column for each engine."""
    results: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for reports in terminalreporter.stats.values():
        for report in reports:
            properties = dict(getattr(report, "user_properties", ()))
            if "cell" in properties:
                name, method, engine = properties["cell"]
                results[row_of((name, method)), engine][method] = FAILED if report.failed else properties.get("result", FAILED)
    if not results:
        return
    # Not at the top, because pytest loads a plugin before it can rewrite the assertions of test files.
    from tests.conformance.conftest import ENGINES
    from tests.conformance.test_fields import CELLS

    # The order in which tests end is another one each time.
    names = [name for name in dict.fromkeys(map(row_of, CELLS)) if any((name, engine) in results for engine in ENGINES)]
    engines = [engine for engine in ENGINES if any((name, engine) in results for name in names)]
    terminalreporter.section("fields of a request, by engine")
    rows = [["field", *engines], *([name, *(_cell(results[name, engine]) for engine in engines)] for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def row_of(cell: tuple[str, str]) -> str:
    """Returns the name of the row for a field and a method. The fields of a TokenizeRequest have rows of their own."""
    name, method = cell
    return f"Tokenize {name}" if method == "Tokenize" else name


def _cell(results: Mapping[str, str]) -> str:
    """Returns the result of all methods, or each with its methods if they differ."""
    methods_of: dict[str, list[str]] = defaultdict(list)
    for method, result in results.items():
        methods_of[result].append(method)
    if len(methods_of) == 1:
        return next(iter(methods_of))
    return "; ".join(f"{result}: {', '.join(methods)}" for result, methods in methods_of.items())
