"""Makes text that is not trusted safe for a terminal.

Such text may have escape sequences, which rewrite the screen, set the clipboard or pose as the shell. It may change the order
in which a line is read (CVE-2021-42574, "Trojan Source"), and it may hide text that only a program sees.
"""

import re
from typing import Final

# C0 but tab and newline, DEL, and C1; the separators of lines and paragraphs; and what has no glyph. That is the property
# Default_Ignorable_Code_Point of Unicode (UAX #44), with bidirectional controls, tags and variation selectors in it, and the
# interlinear annotations.
_INVISIBLE: Final = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029"
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    r"\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)

# Some of it belongs to what is written, one at a time, so that no message hides in a row of them: joiners and variation
# selectors after a visible character that is not ASCII, such as in Persian, Indic scripts and emoji; a joiner between emoji
# after a selector; the selector in the emoji of digits; and the space without width in scripts of Asia that have no other.
_PART_OF_THE_TEXT: Final = (
    rf"(?<=[^\x00-\x7f\s{_INVISIBLE}])[\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]"
    r"|(?<=\ufe0f)\u200d|(?<=[#*0-9])\ufe0f|(?<=[\u0e00-\u0eff\u1000-\u109f\u1780-\u17b3\u17b6-\u17ff])\u200b"
)
_INVISIBLE_CHARACTER: Final = re.compile(rf"({_PART_OF_THE_TEXT})|[{_INVISIBLE}]")

# What `str.splitlines` splits at.
_LINE_BREAK: Final = re.compile(r"[\n-\r\x1c-\x1e\x85\u2028\u2029]")

# The first 32 and DEL have pictures in Unicode.
_PICTURES: Final = {chr(code): chr(0x2400 + code) for code in range(0x20)} | {"\x7f": "\u2421"}


def visible(text: str, before: str = "") -> str:
    """Returns the text with each invisible character replaced by a picture of it, or by U+FFFD.

    Tab and newline remain, and so do joiners and variation selectors that belong to what is written. The length stays the same.

    Arguments:
        text: Any text.
        before: What was written before it: the last two characters at least.
    """
    return _INVISIBLE_CHARACTER.sub(_shown, before + text)[len(before) :]


def one_line(text: str) -> str:
    """Returns the text with a picture, or U+FFFD, for each line break, so that no part of it poses as another line."""
    return _LINE_BREAK.sub(lambda found: _picture(found[0]), text)


def _shown(found: re.Match[str]) -> str:
    return found[1] or _picture(found[0])


def _picture(character: str) -> str:
    return _PICTURES.get(character, "\ufffd")
