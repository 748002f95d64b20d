"""The part of `generate_many` that is the same for threads (`_many_sync`) and asyncio (`_many_async`)."""

from collections.abc import AsyncIterable, Iterable
from numbers import Integral
from typing import Final, Unpack

from flywheel_proto.v1 import generation_pb2

from flywheel_client._request import GenerationFields, Prompt, common_request, request_for

DEFAULT_CONCURRENCY: Final = 8


class BasePromptResults:
    """Makes the requests for prompts, and counts the prompts."""

    _concurrency: int
    _common: generation_pb2.GenerationRequest
    _prompts_read = 0
    _all_read = False
    _ended = True
    """Whether the iteration has ended. It has not begun before the arguments are checked."""

    def __init__(self, prompts: object, concurrency: int, **fields: Unpack[GenerationFields]) -> None:
        """Checks the arguments; raises `TypeError` or `ValueError` at once, and not when a prompt is read."""
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable | AsyncIterable):
            raise TypeError("prompts must be an iterable of prompts, and not one text")
        if not isinstance(concurrency, Integral) or isinstance(concurrency, bool):
            raise TypeError(f"concurrency must be an integer, not {concurrency!r}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self._concurrency = int(concurrency)
        self._common = common_request(**fields)

    def _request_for(self, prompt: Prompt) -> generation_pb2.GenerationRequest:
        """Returns the request for the next prompt."""
        request = request_for(self._common, self._prompts_read, prompt)
        self._prompts_read += 1
        return request
