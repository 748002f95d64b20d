"""Decides when llama.cpp gets a prompt to read: in order, and only as many prompts at a time as fit into one step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class PendingPrompt:
    """A prompt that llama.cpp has been given to read.

    Attributes:
        unread: How many of its tokens no step has read yet.
        is_alone: Whether no other prompt may be read at the same time.
        changed: Set when `unread` or `has_begun` changes.
        has_begun: Whether a step has begun to read the prompt.
    """

    unread: int
    is_alone: bool
    changed: asyncio.Event
    has_begun: bool = False

    def note_progress(self, unread: int) -> None:
        """Notes that a step begins to read the prompt, or has read a part of it, and how many tokens are unread."""
        self.has_begun = True
        self.unread = unread
        self.changed.set()


class PromptQueue:
    """Admits prompts in the order in which they come.

    A slot of llama.cpp keeps the context of its last prompt until a step begins to read its next prompt. If llama.cpp runs out
    of context, it clears idle slots. A slot with a prompt that no step has begun to read is not idle, so its old context would
    stay, and all completions would fail. So the next step must begin each prompt that llama.cpp gets. A prompt is admitted if

    - one step can read it and the unread tokens of all other prompts; then their order does not matter; or
    - all other prompts have begun, and one step can read their unread tokens. llama.cpp takes new prompts only between two
      steps, so the step after that one begins the new prompt.

    Arguments:
        step_tokens: Tokens of prompts that one step can read besides the tokens that it generates.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._prompts: set[PendingPrompt] = set()
        self._queue = asyncio.Lock()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def admit(self, tokens: int, *, alone: bool = False) -> AsyncIterator[PendingPrompt]:
        """Waits until llama.cpp may get a prompt of that many tokens. When the context ends, the prompt counts as read.

        If it is to be read `alone`, no other prompt may be unread at the same time.
        """
        # asyncio.Lock wakes its waiters in order.
        async with self._queue:
            while not self._is_admissible(tokens, alone=alone):
                self._changed.clear()
                await self._changed.wait()
            prompt = PendingPrompt(tokens, alone, self._changed)
            self._prompts.add(prompt)
        try:
            yield prompt
        finally:
            self._prompts.remove(prompt)
            self._changed.set()

    def _is_admissible(self, tokens: int, *, alone: bool) -> bool:
        others = [prompt for prompt in self._prompts if prompt.unread]
        if not others:
            return True
        if alone or any(prompt.is_alone for prompt in others):
            return False
        unread = sum(prompt.unread for prompt in others)
        fits_same_step = unread + tokens <= self._step_tokens
        fits_next_step = unread <= self._step_tokens and all(prompt.has_begun for prompt in others)
        return fits_same_step or fits_next_step
