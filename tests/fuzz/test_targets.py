"""The fuzz targets, with a few hundred inputs each: `python -m fuzz.coverage_guided` tries millions."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.targets import API_KEY, SEEDS, TARGETS
from fuzz.wire import mutated

LINES = st.lists(
    st.sampled_from([b"x-request-id:", b"authorization:", b"Bearer ", b"bearer", b" ", b"\n", b"\xff", API_KEY.encode(), b"id"])
    | st.binary(max_size=8)
).map(b"".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["keys", "name", "hash", "x"]), inner, max_size=4)
    ),
    max_leaves=5,
)


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seeds in SEEDS.items() for seed in seeds])
def test_seeds(name: str, seed: bytes) -> None:
    TARGETS[name](seed)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=300), seed=st.integers(0, 2**32))
def test_any_bytes_and_those_close_to_right_ones(name: str, data: bytes, seed: int) -> None:
    TARGETS[name](data)
    TARGETS[name](mutated(random.Random(seed), [*SEEDS[name]]))


@pytest.mark.parametrize("name", ["request_ids", "authorization"])
@given(data=LINES)
def test_metadata(name: str, data: bytes) -> None:
    TARGETS[name](data)


@given(JSON)
def test_any_json_as_a_file_of_keys(value: object) -> None:
    TARGETS["keys_file"](json.dumps(value).encode())
