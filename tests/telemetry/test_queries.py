"""Dashboard, alerts, autoscalers and documentation name metrics and labels that a real server has."""

import re
from itertools import combinations
from pathlib import Path
from typing import get_args

import grpc
import pytest
import yaml
from flywheel_server import errors

from tests.contract import ROOT
from tests.telemetry import promql
from tests.telemetry.monitored import Exposed, call_in_every_way, monitored, scraped
from tests.telemetry.promql import ALERTS, DASHBOARD, DEPLOY, DOCUMENT, Query

ADDED = {"instance", "job", "namespace", "pod"}
"""Labels that Prometheus adds to each metric, on Kubernetes too."""
MADE_BY_PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate"}}

VALUES = {
    "reason": {
        *re.findall(r"\b[A-Z]+_[A-Z_]+\b|\bOVERLOADED\b", str(errors.__doc__)),
        *get_args(errors.UnauthenticatedReason),
    },
    "rpc_response_status_code": {code.name for code in grpc.StatusCode},
}
"""What labels can have besides what the calls of this test make."""


@pytest.fixture(scope="module")
async def exposed(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    async with monitored(tmp_path_factory.mktemp("monitored")) as (stub, port):
        await call_in_every_way(stub)
        return Exposed(await scraped(port))


def test_there_are_queries_of_each_kind() -> None:
    assert len(promql.queries()) > 70
    assert len(list(promql.variable_queries())) == 3
    assert len(list(promql.scaling_queries())) == 3


def test_each_metric_and_label_of_a_query_exists(exposed: Exposed) -> None:
    known = {**exposed.labels, **MADE_BY_PROMETHEUS}
    for text in promql.queries():
        query = Query(text)
        assert query.metrics, text
        assert query.metrics <= known.keys(), text
        for metric, labels in query.labels.items():
            assert labels <= known[metric] | ADDED, text
        assert query.grouped <= set().union(*(known[metric] for metric in query.metrics)) | ADDED, text


def test_each_value_that_a_query_looks_for_can_occur(exposed: Exposed) -> None:
    for text in promql.queries():
        for label, is_regex, value in Query(text).matchers:
            if label in ADDED or label in MADE_BY_PROMETHEUS["ALERTS"] or value in {"", ".*"}:
                continue
            values = exposed.values[label] | VALUES.get(label, set())
            for alternative in value.split("|") if is_regex else [value]:
                pattern = alternative if is_regex else re.escape(alternative)
                assert any(re.fullmatch(pattern, each) for each in values), (text, alternative)


def test_legends_and_variables_name_labels_that_exist(exposed: Exposed) -> None:
    for title, text, legend in promql.dashboard_queries():
        query = Query(text)
        left = query.grouped or set().union(*(exposed.labels[metric] for metric in query.metrics)) | ADDED
        assert set(re.findall(r"{{(\w+)}}", legend)) <= left, title
    for selector, label in promql.variable_queries():
        (metric,) = Query(selector).metrics
        assert label in exposed.labels[metric] | ADDED


def test_the_picker_of_llm_d_reads_metrics_that_exist(exposed: Exposed) -> None:
    plugins = yaml.safe_load((DEPLOY / "kubernetes" / "llm-d.yaml").read_text())["plugins"]
    (engine,) = next(each for each in plugins if each["type"] == "core-metrics-extractor")["parameters"]["engineConfigs"]
    named = {value for name, value in engine.items() if name.endswith("Spec")}
    assert len(named) == 3
    assert {exposed.kinds[name] for name in named} == {"gauge"}
    assert all(exposed.labels[name] == set() for name in named), "the picker would take any one of several"


def documented() -> dict[str, tuple[str, set[str]]]:
    """Returns the kind and the labels of each metric in the tables of the document."""
    rows = re.findall(r"^\| (`[a-z].*?) \| ([a-z, ]+) \|(.*?)\|", DOCUMENT, re.MULTILINE)
    return {
        name: (kind, {label for each in labels.split(";") for label in re.findall(r"`(\w+)`", each.split(":")[0])})
        for names, kind, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def test_each_metric_is_documented_with_its_kind_and_labels(exposed: Exposed) -> None:
    tables = documented()
    assert tables.keys() == exposed.kinds.keys()
    for name, (kind, labels) in tables.items():
        assert exposed.kinds[name] in kind, name
        assert exposed.labels_of(name) == labels, name


def test_each_alert_has_a_line_in_the_runbook() -> None:
    (section,) = re.findall(r"^## Alerts\n(.*?)^## ", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [rule["alert"] for rule in ALERTS]
    assert {rule["annotations"]["runbook"] for rule in ALERTS} == {"docs/operations.md#alerts"}


def test_each_alert_is_tested() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yaml").read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert fired == {rule["alert"] for rule in ALERTS}


def test_panels_have_places_and_questions_of_their_own() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["description"] for panel in promql.panels())


def test_each_query_of_the_dashboard_asks_the_source_that_was_chosen() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in promql.panels():
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [source] * (
            1 + len(panel["targets"])
        )
        assert all("$instance" in target["expr"] for target in panel["targets"])


def test_the_files_that_the_document_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", DOCUMENT)
    assert links
    assert all(Path(ROOT / "docs" / link).exists() for link in links)
