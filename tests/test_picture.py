"""The pictures of the documentation have what the commands print, besides sampled text and numbers."""

import asyncio
import html
import re
import shlex
from pathlib import Path

import pytest
from flywheel_client._top.overview import NAME_WIDTH, overview
from flywheel_client._top.panels import PANELS
from flywheel_client._top.servers import History
from flywheel_server.engines.scripted import Script, ScriptedEngine

from docs.picture import COMMAND, PICTURE, draw, record
from docs.top_pictures import ONE_SERVER, SEVERAL_SERVERS, SIZE
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


@pytest.mark.parametrize("picture", [PICTURE, ONE_SERVER, SEVERAL_SERVERS], ids=lambda picture: picture.name)
def test_a_picture_fetches_nothing(picture: Path) -> None:
    assert "url(http" not in picture.read_text()
    assert "@font-face" not in picture.read_text()


@pytest.mark.parametrize("picture", [ONE_SERVER, SEVERAL_SERVERS], ids=lambda picture: picture.name)
def test_the_pictures_of_top_have_the_lines_of_the_dashboard(picture: Path) -> None:
    texts = html.unescape(re.sub(r"<[^>]*>", "\n", picture.read_text())).replace("\xa0", " ")
    lines = [line.plain for line in overview(None, History(), SIZE[0])]
    for word in [*(line[:NAME_WIDTH].strip() for line in lines), *PANELS]:
        assert re.search(rf"(^| ){re.escape(word)}( |$)", texts, re.MULTILINE), word


def test_the_readme_says_the_command_of_the_picture() -> None:
    assert f".venv/bin/{shlex.join(COMMAND)}\n" in (ROOT / "README.md").read_text()
