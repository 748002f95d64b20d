"""The queries of the dashboard, the alerts, the autoscalers and the documentation."""

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml

from tests.contract import ROOT

DEPLOY = ROOT / "deploy"
DASHBOARD: Any = json.loads((DEPLOY / "grafana" / "flywheel.json").read_text())
ALERTS: Any = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
DOCUMENT = (ROOT / "docs" / "observability.md").read_text()


REGEX = (promql_parser.MatchOp.Re, promql_parser.MatchOp.NotRe)


class Query:
    """A query: what it reads, and the labels that it names.

    Attributes:
        metrics: The names that it selects.
        labels: For each name, the labels that its matchers name.
        matchers: Each label of a matcher, whether the matcher is a regular expression, and its value.
        grouped: The labels that it groups or joins by.
    """

    def __init__(self, text: str) -> None:
        self.metrics: set[str] = set()
        self.labels: dict[str, set[str]] = {}
        self.matchers: list[tuple[str, bool, str]] = []
        self.grouped: set[str] = set()
        promql_parser.walk(promql_parser.parse(text), self._visit)

    def _visit(self, node: Any) -> None:
        modifier = getattr(node, "modifier", None)
        if isinstance(node, promql_parser.VectorSelector):
            name = node.name or "{}"
            self.metrics.add(name)
            for matcher in node.matchers.matchers:
                is_regex = matcher.op in REGEX
                self.labels.setdefault(name, set()).add(matcher.name)
                self.matchers.append((matcher.name, is_regex, matcher.value))
        elif isinstance(node, promql_parser.AggregateExpr) and modifier:
            self.grouped.update(modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and modifier and modifier.matching:
            self.grouped.update(modifier.matching.labels)


def panels() -> list[Any]:
    """Returns the panels of the dashboard that show something."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_queries(window: str = "5m") -> Iterator[tuple[str, str, str]]:
    """Yields the title of each panel with each of its queries and the legend, as Grafana asks when everything is chosen."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], as_asked(target["expr"], window), target["legendFormat"]


def as_asked(query: str, window: str = "5m") -> str:
    """Returns a query of the dashboard with its variables replaced, when everything is chosen."""
    query = re.sub(r"\$__(rate_interval|range)", window, query)
    return re.sub(r'"\$(instance|model|caller)"', '".*"', query)


def variable_queries() -> Iterator[tuple[str, str]]:
    """Yields the selector and the label of each variable of the dashboard that is read from metrics."""
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match, variable["name"]
            yield as_asked(match[1]), match[2]


def scaling_queries() -> Iterator[str]:
    """Yields what KEDA and the adapter of the HPA ask."""
    (trigger,) = yaml.safe_load((DEPLOY / "kubernetes" / "keda.yaml").read_text())["spec"]["triggers"]
    yield trigger["metadata"]["query"]
    comment = re.findall(r"^#     (.*)$", (DEPLOY / "kubernetes" / "hpa.yaml").read_text(), re.MULTILINE)
    (rule,) = yaml.safe_load("\n".join(comment))["rules"]["custom"]
    yield rule["seriesQuery"]
    yield rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'pod=~"a|b"')


def documented_queries() -> Iterator[str]:
    """Yields the examples of the documentation."""
    (block,) = re.findall(r"^```promql\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    yield from (line for line in block.splitlines() if line and not line.startswith("#"))


def queries() -> list[str]:
    """Returns all queries."""
    return [
        *(query for _, query, _ in dashboard_queries()),
        *(query for query, _ in variable_queries()),
        *(as_asked(each["expr"]) for each in DASHBOARD["annotations"]["list"]),
        *(rule["expr"] for rule in ALERTS),
        *scaling_queries(),
        *documented_queries(),
    ]
