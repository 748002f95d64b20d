"""Reads the values of single samples of a metrics endpoint, in the format that Prometheus asks for."""

from collections.abc import Mapping

from prometheus_client.openmetrics import parser

from tests.serving import free_ports, until
from tests.telemetry.scraping import get

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def free_address() -> str:
    """Returns an address for metrics."""
    return f"127.0.0.1:{free_ports(1)[0]}"


async def scraped(address: str) -> dict[str, float]:
    """Returns the values of all samples by name and labels, such as `x_total{a="b",c="d"}`."""
    answer = await get(int(address.rpartition(":")[2]), Accept=OPENMETRICS)
    assert answer.status == 200, answer
    families = parser.text_string_to_metric_families(answer.content.decode())  # type: ignore[no-untyped-call]
    return {_key(sample.name, sample.labels): sample.value for family in families for sample in family.samples}


def _key(name: str, labels: Mapping[str, str]) -> str:
    described = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{described}}}" if described else name


async def until_scraped(address: str, expected: Mapping[str, float]) -> dict[str, float]:
    """Scrapes until the samples have these values. Returns all values."""
    values: dict[str, float] = {}

    async def is_so() -> bool:
        nonlocal values
        values = await scraped(address)
        return expected.items() <= values.items()

    try:
        await until(is_so, f"{expected}", within=20)
    except AssertionError as error:
        found = {key: values.get(key) for key in expected}
        raise AssertionError(f"{found}, but expected {dict(expected)}") from error
    return values
