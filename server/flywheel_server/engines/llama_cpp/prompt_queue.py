"""Which prompts llama.cpp is given to read, and when: in order, as many at a time as one of its steps has room for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Prompt:
    """A prompt that llama.cpp has been given to read.

    Attributes:
        unread: How many of its tokens no step has read yet.
        has_begun: Whether a step has begun to read it.
        is_alone: Whether no other prompt may be read at the same time.
    """

    def __init__(self, tokens: int, changed: asyncio.Event, *, is_alone: bool) -> None:
        self.unread = tokens
        self.has_begun = False
        self.is_alone = is_alone
        self._changed = changed

    def progress(self, unread: int) -> None:
        """Takes in that a step begins to read the prompt, or has read some of it, and how many tokens are left."""
        self.has_begun = True
        self.unread = unread
        self._changed.set()


class PromptQueue:
    """Lets prompts be read in the order in which they come.

    A slot of llama.cpp keeps its last prompt until a step begins to read the next one. If llama.cpp needs room, it takes that
    of idle slots. It does not take that of a slot which waits to begin because a step is full of other prompts: the reserved
    room would be missing, and all completions would fail. So no slot may wait to begin. The next prompt is let in

    - if one step has room for it and all that is unread of the others, in whatever order llama.cpp reads them; or
    - if all others have begun, and one step has room for what is unread of them. llama.cpp takes new prompts only between two
      steps, so it gets the next prompt when that step has ended.

    Arguments:
        step_tokens: Tokens of prompts that a step has room for, whatever it generates besides.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._prompts: set[Prompt] = set()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def turn(self, tokens: int, *, alone: bool = False) -> AsyncIterator[Prompt]:
        """Waits until a prompt with so many tokens may be read. It counts as read at the end of the context.

        Arguments:
            tokens: The length of the prompt.
            alone: Whether nothing else may be unread meanwhile.
        """
        # asyncio.Lock wakes its waiters in order.
        async with self._turn:
            while not self._may_begin(tokens, alone=alone):
                self._changed.clear()
                await self._changed.wait()
            prompt = Prompt(tokens, self._changed, is_alone=alone)
            self._prompts.add(prompt)
        try:
            yield prompt
        finally:
            self._prompts.remove(prompt)
            self._changed.set()

    def _may_begin(self, tokens: int, *, alone: bool) -> bool:
        others = [prompt for prompt in self._prompts if prompt.unread]
        if not others:
            return True
        if alone or any(prompt.is_alone for prompt in others):
            return False
        unread = sum(prompt.unread for prompt in others)
        fits_too = unread + tokens <= self._step_tokens
        is_next = unread <= self._step_tokens and all(prompt.has_begun for prompt in others)
        return fits_too or is_next
