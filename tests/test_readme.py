"""The README says what the code does: its table of settings is made from them, and its Python runs.

`python -m tests.test_readme` writes the table.
"""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.settings import PREFIX, Settings, default_text, flag

from tests.serving import serving

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- settings: written by `python -m tests.test_readme` -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def table() -> str:
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{default_text(field)}`" if default_text(field) else ""
        option = f"`{flag(name)}`" if flag(name) else ""
        rows.append(f"| {option} | `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_settings_is_up_to_date() -> None:
    (written,) = TABLE.findall(README.read_text())
    assert written == table(), "run `python -m tests.test_readme`"


async def test_the_python_of_the_readme_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    async with serving(ScriptedEngine()) as target:
        program = example.replace("localhost:50051", target.address)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
    assert process.returncode == 0
    for expected in ("llama", "max_tokens must be", "top_p must be"):
        assert expected in out.decode()


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), README.read_text()))
