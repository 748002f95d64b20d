"""The performance targets of our server, most of them relative to other servers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import figures
from benchmarks.figures import Figure, Spread
from benchmarks.runs import Run


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for the median of a figure of our server, or for the median ratio of this figure to another server's.

    Attributes:
        title: The name of the figure, with the unit.
        scenario: The scenario in which it is measured.
        figure: The figure.
        limit: The maximum, or the minimum if `is_minimum`.
        is_minimum: Whether the limit is a minimum.
        peer: The name of our server.
        against: The name of the peer to divide by; empty for no ratio.
    """

    title: str
    scenario: str
    figure: Figure
    limit: float
    is_minimum: bool = False
    peer: str = "ours"
    against: str = ""

    def reached(self, runs: Sequence[Run]) -> Spread | None:
        """Returns the measured figure or ratio; None if the scenario was not run."""
        ours = figures.select(runs, self.scenario, self.peer)
        if not self.against:
            return figures.spread(ours, self.figure)
        return figures.ratio(ours, figures.select(runs, self.scenario, self.against), self.figure)

    def is_met(self, reached: Spread) -> bool:
        """Returns whether the measured median is within the limit."""
        return reached.median >= self.limit if self.is_minimum else reached.median <= self.limit


def _share_of(wanted: float) -> Callable[[Run], float]:
    """Returns a figure: the tokens per second that arrived, as a share of the wanted ones."""
    return lambda run: figures.tokens_per_second(run) / wanted


TARGETS: Final = (
    *(
        Target("CPU per delta ÷ bare grpc.aio with our engine", f"paced-{streams}", figures.cpu, 1.15, against="bare-engine")
        for streams in (16, 64, 256)
    ),
    *(Target("CPU per delta ÷ FastAPI", f"paced-{streams}", figures.cpu, 1.0, against="fastapi") for streams in (64, 256, 512)),
    Target("deltas/s ÷ bare grpc.aio", "unpaced-64", figures.tokens_per_second, 4.0, is_minimum=True, against="bare"),
    *(
        Target("time to first message, p50 ÷ bare grpc.aio", scenario, figures.FIRST_P50, 2.0, against="bare")
        for scenario in ("paced-256", "unpaced-64")
    ),
    *(Target("CPU per call ÷ bare grpc.aio", f"unary-{callers}", figures.cpu, 1.6, against="bare") for callers in (1, 64, 512)),
    Target("share of the 25,600 deltas/s", "paced-512", _share_of(25_600), 0.99, is_minimum=True),
    Target("gap between messages, p99 ms", "paced-512", figures.GAP_P99, 100),
    Target("share of calls that failed", "paced-512", figures.failed_share, 0),
    Target("share of the 20,000 deltas/s, 2 workers", "paced-2000x10", _share_of(20_000), 0.99, is_minimum=True, peer="ours-2"),
    Target("share of calls that failed, 2 workers", "paced-2000x10", figures.failed_share, 0, peer="ours-2"),
    *(
        Target("calls/s of 2 workers ÷ 1", f"unary-{callers}", figures.tokens_per_second, 1.8, True, "ours-2", "ours")
        for callers in (64, 512)
    ),
    *(
        Target("tokens/s ÷ llama.cpp", f"model-{streams}", figures.tokens_per_second, 0.95, True, "embedded", "llama")
        for streams in (1, 4, 8)
    ),
    Target("time to first token, p50 ÷ llama.cpp", "model-8", figures.FIRST_P50, 1.0, peer="embedded", against="llama"),
    Target("speed kept while a long prompt is read", "model-long-prompt", figures.kept, 0.8, True, "embedded"),
    Target("seconds to the first answer", "model-1", figures.start_seconds, 2.0, peer="embedded"),
)
"""`benchmarks.peers` defines the names of the peers."""
