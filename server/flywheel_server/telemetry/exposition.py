"""Writes metrics in the text formats of Prometheus and OpenMetrics, in small steps between which the event loop serves calls.

A thread would not do instead: Python gives the event loop its turn back only after 5 ms.
"""

import asyncio
import copy
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

SAMPLES_PER_STEP: Final = 64
"""Samples, each of which is a line, that are written in one step. A line takes up to 10 microseconds."""

_END: Final = b"# EOF\n"


async def text_of(registry: CollectorRegistry, *, openmetrics: bool) -> bytes:
    """Returns all metrics of the registry as text in UTF-8, in OpenMetrics 1.0.0 or in Prometheus' text format 0.0.4."""
    write: Callable[[Collector], bytes] = openmetrics_exposition.generate_latest if openmetrics else exposition.generate_latest
    parts: list[bytes] = []
    for family in registry.collect():
        header = write(_Part(family, [])).removesuffix(_END)
        parts.append(header)
        samples = iter(family.samples)
        while some := list(islice(samples, SAMPLES_PER_STEP)):
            parts.append(write(_Part(family, some)).removesuffix(_END).removeprefix(header))
            await asyncio.sleep(0)
    return b"".join([*parts, _END] if openmetrics else parts)


class _Part(Collector):
    """Some of the samples of a family."""

    def __init__(self, family: Metric, samples: list[Sample]) -> None:
        self._family = copy.copy(family)
        self._family.samples = samples

    def collect(self) -> Iterable[Metric]:
        """Returns the family with these samples only."""
        return (self._family,)
