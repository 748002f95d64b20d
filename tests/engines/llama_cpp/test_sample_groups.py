"""A request's samples are divided into as few completions as make sense, within slots and context."""

from flywheel_server.engines.llama_cpp.sample_groups import SampleGroups
from flywheel_server.messages import GenerationRequest
from hypothesis import given
from hypothesis import strategies as st


@given(
    room=st.tuples(st.integers(1, 16), st.integers(2, 2000)),
    prompt=st.integers(1, 2000),
    max_tokens=st.integers(1, 2000),
    samples=st.tuples(st.integers(1, 16), st.none() | st.integers(1, 16)),
    stop=st.sampled_from([[], ["x"]]),
)
def test_a_call_holds_the_context_of_the_groups_that_run_at_the_same_time(
    room: tuple[int, int], prompt: int, max_tokens: int, samples: tuple[int, int | None], stop: list[str]
) -> None:
    slots, pool = room
    num_samples, max_size = samples
    prompt = min(prompt, pool - 1)
    max_tokens = min(max_tokens, pool - prompt)
    request = GenerationRequest(text="x", max_tokens=max_tokens, num_samples=num_samples, stop=stop)
    groups = SampleGroups.of(request, prompt, slots=slots, context_tokens=pool, max_size=max_size)
    assert max_size is None or max(map(len, groups.indexes)) <= max_size
    assert [index for group in groups.indexes for index in group] == list(range(num_samples))
    at_a_time = groups.indexes[: groups.concurrency]
    assert at_a_time
    assert sum(map(len, at_a_time)) <= slots
    held = sum(prompt + len(group) * max_tokens for group in at_a_time)
    assert held <= groups.context_tokens <= pool
    more = groups.indexes[: len(at_a_time) + 1]
    if len(more) > len(at_a_time):
        needed = sum(prompt + len(group) * max_tokens for group in more)
        assert sum(map(len, more)) > slots or needed > pool, "a group that has room runs"


def test_samples_that_run_one_by_one_hold_the_context_of_one() -> None:
    request = GenerationRequest(text="x", max_tokens=10, num_samples=3, seed=1)
    groups = SampleGroups.of(request, 100, slots=8, context_tokens=1000, one_by_one=True)
    assert groups == SampleGroups([range(1), range(1, 2), range(2, 3)], concurrency=1, context_tokens=110)


def test_seeds_that_begin_again_at_zero_do_not_share_a_completion() -> None:
    for seed, sizes in ((2**31 - 3, [3]), (2**31 - 2, [1, 1, 1])):
        request = GenerationRequest(text="x", max_tokens=10, num_samples=3, seed=seed)
        groups = SampleGroups.of(request, 100, slots=8, context_tokens=1000)
        assert [len(group) for group in groups.indexes] == sizes
