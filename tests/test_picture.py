"""The picture of the README has what the command prints: the same lines, besides the sampled text and the numbers."""

import asyncio
import html
import re
import shlex

from flywheel_server.engines.scripted import Script, ScriptedEngine

from docs.picture import COMMAND, PICTURE, draw, record
from tests.contract import ROOT
from tests.serving import serving

OURS = re.compile(r"\$|flywheel.*|── sample \d ──|sample \d: .*")
"""The lines that are the same whatever the model says."""


def form(picture: str) -> list[tuple[str, str]]:
    """Returns our own lines of a picture, each with its style, and every number and finish reason in them replaced."""
    styles = dict(re.findall(r"\.terminal-(r\d+) \{(.*?)\}", picture))
    texts = re.findall(r'<text class="terminal-(r\d+)"[^>]*>(.*?)</text>', picture)
    lines = [(html.unescape(text).replace("\xa0", " ").strip(), styles[style].strip()) for style, text in texts]
    masked = [
        (re.sub(r"\b(stop|length)\b", "REASON", re.sub(r"[\d.]*\d", "N", line)), style)
        for line, style in lines
        if OURS.fullmatch(line)
    ]
    assert len(masked) == 8
    return masked


async def test_the_picture_is_what_the_command_prints() -> None:
    async with serving(ScriptedEngine(Script(token_delay=0.001))) as target:
        printed = await asyncio.to_thread(record, target.address)
    assert form(PICTURE.read_text()) == form(draw(printed))


def test_the_picture_fetches_nothing() -> None:
    assert "url(http" not in PICTURE.read_text()
    assert "@font-face" not in PICTURE.read_text()


def test_the_readme_says_the_command_of_the_picture() -> None:
    assert f".venv/bin/{shlex.join(COMMAND)}\n" in (ROOT / "README.md").read_text()
