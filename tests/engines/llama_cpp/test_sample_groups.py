"""A request's samples are divided into as few completions as make sense, within slots and context."""

from flywheel_server.engines.llama_cpp.sample_groups import SampleGroups
from flywheel_server.messages import GenerationRequest
from hypothesis import given
from hypothesis import strategies as st


@given(
    room=st.tuples(st.integers(1, 16), st.integers(2, 2000)),
    prompt=st.integers(1, 2000),
    max_tokens=st.integers(1, 2000),
    num_samples=st.integers(1, 16),
    stop=st.sampled_from([[], ["x"]]),
)
def test_a_call_holds_the_context_of_the_groups_that_run_at_the_same_time(
    room: tuple[int, int], prompt: int, max_tokens: int, num_samples: int, stop: list[str]
) -> None:
    slots, pool = room
    prompt = min(prompt, pool - 1)
    max_tokens = min(max_tokens, pool - prompt)
    request = GenerationRequest(text="x", max_tokens=max_tokens, num_samples=num_samples, stop=stop)
    groups = SampleGroups.of(request, prompt, slots=slots, context_tokens=pool)
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
