"""How the samples of a request are divided into completions of llama.cpp, within the slots and the context of the engine."""

from dataclasses import dataclass

from flywheel_server.engines.seeds import SEEDS
from flywheel_server.messages import GenerationRequest


@dataclass(frozen=True, slots=True)
class SampleGroups:
    """The groups of a request's samples. A group is one completion of llama.cpp, which reads the prompt once for all of them.

    Attributes:
        indexes: The samples of each group.
        concurrency: How many groups run at the same time.
        context_tokens: Tokens of context that these groups hold together.
    """

    indexes: list[range]
    concurrency: int
    context_tokens: int

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        prompt_tokens: int,
        *,
        slots: int,
        context_tokens: int,
        one_by_one: bool = False,
        max_size: int | None = None,
    ) -> "SampleGroups":
        """Returns the groups for a prompt of that length, on an engine with these slots and tokens of context in all.

        If the samples run `one_by_one`, each of them is a group, and one group runs at a time. `max_size` is the maximum number
        of samples in a group; None if there is none.
        """
        if one_by_one:
            return cls([range(index, index + 1) for index in range(request.num_samples)], 1, prompt_tokens + request.max_tokens)
        size = min(request.num_samples, slots, (context_tokens - prompt_tokens) // request.max_tokens, max_size or slots)
        # llama.cpp does not know our stop sequences and `eos_token_ids`: it continues a sample that one of them has ended until
        # the whole completion ends. So samples that may end early share a completion only if reading the prompt once more costs
        # more than a sample that goes on in vain.
        if (request.stop or request.eos_token_ids) and prompt_tokens < request.max_tokens:
            size = 1
        # In a completion, llama.cpp counts the seeds of the samples up beyond the last seed of the contract.
        if request.seed is not None and request.seed + request.num_samples > SEEDS:
            size = 1
        samples = range(request.num_samples)
        indexes = [samples[start : start + size] for start in range(0, len(samples), size)]
        context_of_group = prompt_tokens + size * request.max_tokens
        concurrency = min(len(indexes), slots // size, context_tokens // context_of_group)
        return cls(indexes, concurrency, concurrency * context_of_group)
