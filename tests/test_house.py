"""The sizes of files and functions, which no linter knows. What is larger has more than one job."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("server", "client", "proto", "tests", "examples", "benchmarks", "chaos", "fuzz")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def test_no_file_and_no_function_is_too_long() -> None:
    found = []
    for file in (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if "_pb2" not in file.name):
        text = file.read_text()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            found.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for each in ast.walk(ast.parse(text)):
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (each.end_lineno or 0) - each.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append(f"{file.relative_to(ROOT)}: {each.name} has {lines} lines")
    assert found == []
