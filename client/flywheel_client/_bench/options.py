"""The options of `flywheel bench`: a field of a dataclass is an option. Nothing here imports grpc."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import click

from flywheel_client._options import SECONDS, FiniteFloatRange, option

MAX_CONCURRENCY: Final = 10_000
MAX_CONNECTIONS: Final = 1_000
MAX_RATE: Final = 100_000.0
MAX_REQUESTS: Final = 10_000_000
MAX_DURATION: Final = 86_400.0
"""Seconds: a day."""
MAX_WARM_UP: Final = 1_000

DEFAULT_CONCURRENCY: Final = 8
DEFAULT_DURATION: Final = 10.0

_SECONDS_OF_A_RUN: Final = FiniteFloatRange(min=0.001, max=MAX_DURATION)
_METHODS: Final = click.Choice(["GenerateDeltas", "Generate", "GenerateAll"])
_WRITTEN_FILE: Final = click.Path(dir_okay=False, path_type=Path)
_REPORT: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of `bench` that are not fields of its requests."""

    concurrency: Annotated[
        int | None,
        option(
            "N",
            "Closed loop: keep N calls in flight; a call begins when another one ends.",
            type=click.IntRange(1, MAX_CONCURRENCY),
            show_default=f"{DEFAULT_CONCURRENCY}, unless --rate is given",
        ),
    ]
    rate: Annotated[
        float | None,
        option(
            "R",
            "Open loop: send R calls a second, whether or not earlier calls have ended.",
            type=FiniteFloatRange(0, MAX_RATE, min_open=True),
        ),
    ]
    arrivals: Annotated[
        str,
        option(
            None,
            "The times between the calls of --rate: random, as of independent users, or constant.",
            type=click.Choice(["poisson", "constant"]),
            default="poisson",
        ),
    ]
    requests: Annotated[int | None, option("N", "End after N calls.", type=click.IntRange(1, MAX_REQUESTS))]
    duration: Annotated[
        float | None,
        option(
            "SECONDS",
            "Begin no call after this time.",
            type=_SECONDS_OF_A_RUN,
            show_default=f"{DEFAULT_DURATION:g}, unless --requests is given",
        ),
    ]
    method: Annotated[str, option(None, "The method to call.", type=_METHODS, default="GenerateDeltas")]
    prompts: Annotated[
        Path | None,
        option(
            "FILE",
            "Prompts: one a line, or a JSON object a line with fields of a request, which override the options.",
            show_default="a built-in set",
        ),
    ]
    connections: Annotated[int, option("N", "Use N connections, in turn.", type=click.IntRange(1, MAX_CONNECTIONS), default=1)]
    warm_up: Annotated[
        int,
        option("N", "First make N calls on each connection that do not count.", type=click.IntRange(0, MAX_WARM_UP), default=1),
    ]
    timeout: Annotated[float, option("SECONDS", "How long each call may take.", type=SECONDS, default=60.0)]
    drain_timeout: Annotated[
        float,
        option(
            "SECONDS",
            "After --duration, wait this long for calls to end. Calls that have not ended then count as failed.",
            type=FiniteFloatRange(0, MAX_DURATION),
            default=30.0,
        ),
    ]
    max_in_flight: Annotated[
        int,
        option(
            "N",
            "The most calls of --rate at the same time. Further calls wait, and their latency counts the wait.",
            type=click.IntRange(1, MAX_CONCURRENCY),
            default=1000,
        ),
    ]
    max_errors: Annotated[int, option("N", "End after N failed calls; 0 sets no limit.", type=click.IntRange(0), default=1000)]
    json_file: Annotated[
        Path | None,
        option("FILE", "Write the report as JSON; - writes it to stdout.", "--json", type=click.Path(path_type=Path)),
    ]
    html_file: Annotated[Path | None, option("FILE", "Write the report as a page with plots.", "--html", type=_WRITTEN_FILE)]
    compare: Annotated[
        tuple[Path, Path] | None,
        option("A.json B.json", "Compare the reports of two runs, and call no server.", type=_REPORT, nargs=2, multiple=False),
    ]
