"""Makes the requests of a run, from a file of prompts or from the built-in ones."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from flywheel_proto.v1 import generation_pb2

from flywheel_client._request import Prompt, common_request, request_for

MAX_FILE_BYTES: Final = 256 * 2**20
"""The longest file of prompts."""

BUILT_IN_PROMPTS: Final = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain in simple words how a bicycle stays upright.",
    "List the steps to bake a loaf of bread, and say why each of them matters.",
    "What is the difference between weather and climate?",
    "Write a polite letter that asks a neighbour to turn down the music in the evening.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show each step.",
    (
        "Describe a walk through a forest in autumn: what you see, what you hear and what you smell. Then turn the description "
        "into a poem of four lines."
    ),
    (
        "Summarise this text in one sentence: The llama is a domesticated South American camelid, widely used as a meat and "
        "pack animal by Andean cultures since the pre-Columbian era. Llamas are social animals and live with others as a herd. "
        "Their wool is soft and contains only a small amount of lanolin. Llamas can learn simple tasks after a few repetitions."
    ),
)
"""Prompts of different lengths. Runs with these prompts can be compared with each other."""


def requests_of(file: Path | None, fields: Mapping[str, Any]) -> list[generation_pb2.GenerationRequest]:
    """Returns the requests, of which a run takes one after another, and begins again after the last one.

    Args:
        file: A file in UTF-8 with a prompt in each line. If the first line that is not empty is a JSON object, each line is
            such an object, with fields of a request that override `fields`. Empty lines are skipped. None takes the built-in
            prompts.
        fields: The fields of all requests besides the prompt.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, is too long or has no prompt, a line is not valid, or a field is not valid.
        TypeError: A field has the wrong type.
    """
    common = common_request(**fields)
    if file is None:
        return [request_for(common, position, prompt) for position, prompt in enumerate(BUILT_IN_PROMPTS)]
    lines = [(number, line) for number, line in enumerate(_lines(file), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} has no prompt")
    has_fields = _object(lines[0][1]) is not None
    made = []
    for number, line in lines:
        try:
            made.append(request_for(common, 0, _prompt(line) if has_fields else line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {number}: {str(error).removeprefix('prompts[0]: ')}") from None
    return made


def _lines(file: Path) -> Sequence[str]:
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{file} is longer than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        # Not `splitlines`, which splits at characters that JSON allows within a text.
        return content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None


def _object(line: str) -> dict[str, Any] | None:
    """Returns the JSON object in a line; None if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _prompt(line: str) -> Prompt:
    fields = _object(line)
    if fields is None:
        raise ValueError("it is not a JSON object, as the first line is")
    if not fields.keys() & {"text", "messages", "prompt_token_ids"}:
        raise ValueError("a prompt is required: text, messages or prompt_token_ids")
    if isinstance(biases := fields.get("logit_bias"), dict):
        # The keys of an object of JSON are always texts.
        fields["logit_bias"] = {int(token_id): bias for token_id, bias in biases.items()}
    return fields
