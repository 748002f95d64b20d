"""Makes untrusted text safe for a terminal.

Untrusted text may have escape sequences, which rewrite the screen, set the clipboard or imitate the shell. It may change the
order in which a line is read (CVE-2021-42574, "Trojan Source"), and it may hide text that only a program sees.
"""

import re
from typing import Final

# The control characters C0 (except tab and newline), DEL and C1; the line and paragraph separators; and characters without a
# glyph: Unicode's property Default_Ignorable_Code_Point (UAX #44), which includes bidirectional controls, tags and variation
# selectors, and the interlinear annotations.
_INVISIBLE: Final = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029"
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    r"\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)

# Some invisible characters are part of the spelling. They are kept one at a time, so that no message hides in a row of them:
# joiners and variation selectors after a visible character that is not ASCII, as in Persian, Indic scripts and emoji; a joiner
# after a variation selector between emoji; the variation selector in the emoji of digits; and the zero-width space in scripts
# of Asia that write no other space.
_SPELLING: Final = (
    rf"(?<=[^\x00-\x7f\s{_INVISIBLE}])[\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]"
    r"|(?<=\ufe0f)\u200d|(?<=[#*0-9])\ufe0f|(?<=[\u0e00-\u0eff\u1000-\u109f\u1780-\u17b3\u17b6-\u17ff])\u200b"
)
_INVISIBLE_CHARACTER: Final = re.compile(rf"({_SPELLING})|[{_INVISIBLE}]")

# The characters at which `str.splitlines` splits.
_LINE_BREAK: Final = re.compile(r"[\n-\r\x1c-\x1e\x85\u2028\u2029]")

# Unicode has pictures of the first 32 characters and of DEL.
_PICTURES: Final = {chr(code): chr(0x2400 + code) for code in range(0x20)} | {"\x7f": "\u2421"}


def visible(text: str, before: str = "") -> str:
    """Returns the text with each invisible character replaced by its picture, or by U+FFFD.

    Keeps tab, newline, and joiners and variation selectors that are part of the spelling. The length stays the same.

    Args:
        text: Any text.
        before: The text that was written before: at least its last two characters.
    """
    return _INVISIBLE_CHARACTER.sub(_shown, before + text)[len(before) :]


def one_line(text: str) -> str:
    """Returns the text with each line break replaced by its picture or U+FFFD, so that the text cannot imitate other lines."""
    return _LINE_BREAK.sub(lambda found: _picture(found[0]), text)


def _shown(found: re.Match[str]) -> str:
    return found[1] or _picture(found[0])


def _picture(character: str) -> str:
    return _PICTURES.get(character, "\ufffd")
