"""Reads the prompts of the command `flywheel`."""

import sys
from typing import Any, Final

MAX_PROMPT_BYTES: Final = 64 * 2**20
"""The longest prompt that is read from stdin, which may be endless. No model can read such a long prompt."""


def read_prompt(prompt: str | None, subcommand: str) -> str:
    """Returns the prompt of a subcommand; reads it from stdin if it is None or "-"."""
    if prompt is None and sys.stdin.isatty():
        raise ValueError(f'no prompt: give one, as in flywheel {subcommand} "Once upon a time", or pipe it in')
    if prompt in {None, "-"}:
        try:
            # Text tools write a newline at the end, some write a byte order mark at the beginning, and Windows ends lines with
            # CR and LF. These are not part of the prompt.
            prompt = _stdin().decode().removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _stdin() -> bytes:
    read = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(read) > MAX_PROMPT_BYTES:
        raise ValueError(f"the prompt on stdin is longer than {MAX_PROMPT_BYTES // 2**20} MiB")
    return read


def prompt_fields(text: str, system: str | None) -> dict[str, Any]:
    """Returns the prompt as fields of a request: a text, or a conversation if there is a system message."""
    return {"text": text} if system is None else {"messages": [("system", system), ("user", text)]}
