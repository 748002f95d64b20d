"""Characters that a terminal does not show, or takes as commands, are replaced; all others remain."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from flywheel_proto._visible import visible


def test_control_characters_have_pictures() -> None:
    shown = visible("".join(map(chr, range(0x100))))
    assert len(shown) == 0x100
    assert [character for character in shown if not character.isprintable()] == ["\t", "\n", "\xa0"]


@pytest.mark.parametrize(
    "text",
    ["👩‍🚀", "❤️‍🔥", "🏳️‍🌈", "👁️‍🗨️", "1️⃣ #️⃣", "می‌خواهم", "क्‍ष", "葛\U000e0100", "ភាសា\u200bខ្មែរ", "\u1820\u180b", "\u0600", "\ue0b0"],
)
def test_what_a_script_or_an_emoji_is_written_with_remains(text: str) -> None:
    assert visible(text) == text
    shown = ""
    for position, character in enumerate(text):
        shown += visible(character, text[:position][-2:])
    assert shown == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "\u00ad",
            "\u034f",
            "\u061c",
            "\u115f",
            "\u180e",
            "\u200b",
            "\u200c",
            "\u200d",
            "\u200e",
            "\u200f",
            "\u2028",
            "\u2029",
        ),
        *(
            "\u202a",
            "\u202e",
            "\u2060",
            "\u2064",
            "\u2065",
            "\u2066",
            "\u2069",
            "\u3164",
            "\ufe00",
            "\ufe0f",
            "\ufeff",
            "\uffa0",
        ),
        *("\ufff9", "\ufffb", "\U0001bca0", "\U0001d173", "\U000e0000", "\U000e0001", "\U000e007f", "\U000e0100", "\U000e01ef"),
    ],
    ids=ascii,
)
def test_what_is_invisible_or_changes_the_order_of_text_is_shown(text: str) -> None:
    assert visible(f"a{text}b {text}") == "a\ufffdb \ufffd"
    # Some characters may be followed by one of these characters, but a second one would be hidden.
    assert visible(f"é{text}{text}{text}")[2:] == "\ufffd\ufffd"


def test_every_format_character_is_shown_or_has_a_glyph() -> None:
    everything = map(chr, range(sys.maxunicode + 1))
    kept = {each for each in everything if unicodedata.category(each) in {"Cc", "Cf", "Zl", "Zp"} and visible(each) == each}
    # The format characters of Arabic, Syriac, Kaithi and Egyptian are drawn around or under the next characters.
    with_glyphs = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    assert kept <= {"\t", "\n", *map(chr, with_glyphs)}
