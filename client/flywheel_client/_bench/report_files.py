"""The files that `flywheel bench` writes its report to."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from flywheel_client._bench.html_report import html_page
from flywheel_client._bench.report import Report
from flywheel_client._terminal import json_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from flywheel_client._bench.options import BenchOptions

STDOUT: Final = Path("-")
"""The file of --json that stands for standard output."""


class ReportFiles:
    """The files that the options name, which a run must find writable before it begins."""

    def __init__(self, options: "BenchOptions") -> None:
        self._files: list[tuple[str, Path, Callable[[Report], bytes]]] = []
        if options.json_file is not None and options.json_file != STDOUT:
            self._files.append(("--json", options.json_file, _json))
        if options.html_file is not None:
            self._files.append(("--html", options.html_file, _html))

    def check(self) -> None:
        """Raises `ValueError` if a file cannot be written, or two options name the same one."""
        for flag, file, _ in self._files:
            try:
                is_new = not file.exists()
                file.open("ab").close()
            except OSError as error:
                raise ValueError(_failure(flag, file, error)) from None
            if is_new:
                # A run that is interrupted early has no report. The path may be a link to the file.
                file.resolve().unlink()
        if len({file.resolve() for _, file, _ in self._files}) < len(self._files):
            raise ValueError("--json and --html must name different files")

    def write(self, report: Report) -> list[str]:
        """Writes all files. Returns what to say of those that could not be written."""
        failures = []
        for flag, file, content in self._files:
            try:
                file.write_bytes(content(report))
            except OSError as error:
                failures.append(_failure(flag, file, error))
        return failures


def _failure(flag: str, file: Path, error: OSError) -> str:
    return f"{flag}: cannot write {file}: {error.strerror}"


def _json(report: Report) -> bytes:
    return f"{json_text(report.as_json())}\n".encode("ascii")


def _html(report: Report) -> bytes:
    return html_page(report).encode("utf-8", "backslashreplace")
