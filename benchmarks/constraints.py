"""Measures how long constraints keep another caller's stream waiting: `python -m benchmarks.constraints`.

One stream runs without a constraint. Beside it, completions start one after the other: some without a constraint, and some with
the costliest constraints that are accepted. The table has the largest gap between two tokens of the stream during each of them.
What a constraint adds is the difference from a completion without one in the same round, which generates as many samples at a
time. These are as many as the engine starts in one step. A gap is the CPU time of the process,
so that other work on the machine does not count. One thread computes, so on a quiet machine a gap is no longer than that.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from flywheel_server.engines.llama_cpp.constraints.grammars import grammar_of
from flywheel_server.engines.llama_cpp.constraints.probe import starts_per_step
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.llama import Chunk, Llama

SLOTS: Final = 5


def _object(properties: int, schema: object) -> dict[str, Any]:
    return {"type": "object", "properties": {f"name{index}": schema for index in range(properties)}}


SCHEMAS: Final[dict[str, Any]] = {
    "a small schema": _object(3, {"type": "string", "maxLength": 20}),
    "1,000 items of objects with 190 properties": {
        "type": "array",
        "items": _object(190, {"type": "string"}),
        "maxItems": 1000,
    },
    "30 ranges of numbers": _object(30, {"type": "number", "minimum": -1.5, "maximum": 12345.678}),
    "1,000 values": {"enum": [f"value {index} {'x' * 40}" for index in range(1000)]},
    "90 alternatives": {
        "anyOf": [_object(2, {"const": index}) | {"required": ["name0"]} for index in range(90)],
    },
    "80 oneOf of 11 schemas": {
        "type": "array",
        "prefixItems": [{"oneOf": [{"$ref": f"#/$defs/{index}"} for index in range(11)]}] * 80,
        "minItems": 80,
        "$defs": {str(index): {"enum": [f"{index} {number}" for number in range(90)]} for index in range(11)},
    },
    "60,000 characters": {"const": "hello " * 10_000},
    "a multiple of 60": {"type": "integer", "multipleOf": 60},
}
REGEXES: Final = {
    r"(?i), then [\w] 55 times": "(?i)" + r"[\w]" * 55,
    r"(?i)[\s\S]*foo[\s\S]{1,100}": r"(?i)[\s\S]*foo[\s\S]{1,100}",
    r"\w, 480 times": r"\w" * 480,
    r"\w{1,1990}": r"\w{1,1990}",
    r"[^\p{L}\p{N}]{1,1000} and more": r"[^\p{L}\p{N}]{1,1000}|[^\p{Lu}]{1,600}",
}
CHOICES: Final = {"1,000 choices": tuple(f"choice {index} {'x' * 40}" for index in range(1000))}


class Stream:
    """A stream without a constraint, which runs until the end of the `with` block. `times` are CPU seconds."""

    def __init__(self, llama: Llama) -> None:
        self.times: list[float] = []
        self._stopped = threading.Event()
        self._runs = threading.Event()
        self._thread = threading.Thread(target=llama.complete, args=(_body(llama, 1, 1800, None), self._on_chunk))

    def _on_chunk(self, _chunk: Chunk) -> bool:
        self.times.append(time.process_time())
        self._runs.set()
        return self._stopped.is_set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._runs.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def largest_gap(self, begun: float) -> float:
        """Returns the largest number of milliseconds between two tokens from that time on."""
        times = [moment for moment in self.times if moment > begun]
        return max(after - before for before, after in zip([begun, *times], times, strict=False)) * 1000


def _body(llama: Llama, samples: int, max_tokens: int, grammar: str | None) -> dict[str, Any]:
    body = {
        "prompt": llama.tokenize("Once upon a time"),
        "n": samples,
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "stream": True,
        "min_p": 0.0,
        "samplers": ["temperature"],
        "ignore_eos": grammar is None,
    }
    return body | ({"grammar": grammar} if grammar else {})


def gap(llama: Llama, grammar: str | None, samples: int) -> float:
    """Returns the largest gap in milliseconds in another stream while a completion starts and generates 24 tokens."""
    with Stream(llama) as stream:
        begun = time.process_time()
        llama.complete(_body(llama, samples, 24, grammar), lambda _chunk: False)
        return stream.largest_gap(begun)


def grammars() -> dict[str, str | None]:
    """Returns the grammars of the costliest constraints, by name."""
    return {
        "none": None,
        **{name: grammar_of(json.dumps(schema), "", ()) for name, schema in SCHEMAS.items()},
        **{name: grammar_of("", regex, ()) for name, regex in REGEXES.items()},
        **{name: grammar_of("", "", texts) for name, texts in CHOICES.items()},
    }


def measure(llama: Llama, rounds: int, samples: int, report: Callable[[str], object]) -> None:
    """Measures all constraints, and reports the rows of the table."""
    given = grammars()
    counts = {name: min(samples, starts_per_step(grammar)) if grammar else samples for name, grammar in given.items()}
    report(f"the first constraint after the start: {gap(llama, given['a small schema'], samples):.0f} ms\n")
    gaps: dict[str, list[float]] = {name: [] for name in given}
    added: dict[str, list[float]] = {name: [] for name in given}
    for _ in range(rounds):
        without = {count: gap(llama, None, count) for count in sorted(set(counts.values()))}
        for name, grammar in given.items():
            gaps[name].append(gap(llama, grammar, counts[name]))
            added[name].append(gaps[name][-1] - without[counts[name]])
    report(
        "| constraint | samples at a time | largest gap, ms: least | median | added, ms: least | median |\n"
        "|---|---|---|---|---|---|"
    )
    for name, count in counts.items():
        figures = (min(gaps[name]), statistics.median(gaps[name]), min(added[name]), statistics.median(added[name]))
        report(f"| {name} | {count} | {' | '.join(f'{figure:.0f}' for figure in figures)} |")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model(), help="a GGUF file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1, help="samples that each constrained completion generates at a time")
    given = parser.parse_args()
    llama = Llama(given.model, context_tokens=8192, slots=SLOTS, threads=1, batch_tokens=64)
    try:
        measure(llama, given.rounds, given.samples, print)
    finally:
        llama.close()


if __name__ == "__main__":
    main()
