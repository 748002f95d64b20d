"""What pytest needs before anything else is imported, the options of the suite, and what many of its tests share."""

import gc
import os
import signal
from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import hypothesis
import pytest
import structlog

# By default, tracebacks are made beautiful, which takes longer than the tests that provoke them.
structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])

# As `flywheel-server` has it; grpc reads it when it is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

# A shell starts what runs in the background with SIGINT ignored, and `nohup` what it runs with SIGHUP ignored. The servers and
# containers of tests would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# A busy machine may pause a test for any time.
hypothesis.settings.register_profile("any pace", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any pace")

if TYPE_CHECKING:
    from tests.modal_cloud import ModalCloud


def pytest_xdist_auto_num_workers() -> int:
    """Returns two more than there are cores to use: tests wait much of the time, for deadlines, containers and subprocesses."""
    from flywheel_server.system.cores import usable_cores

    return usable_cores() + 2


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exempts from garbage collection what is imported and collected. To go through all of it takes 0.2 s each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Has each worker begin with tests on the stand-in of Modal. In the end, other workers take over what a worker has left.

    Each worker has a stand-in of its own, and deploys and starts on it what its tests share. pytest-xdist gives the first part
    of the tests to the first worker, and so on.
    """
    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    on_modal = [item for item in items if "cloud" in getattr(item, "fixturenames", ())]
    others = [item for item in items if "cloud" not in getattr(item, "fixturenames", ())]
    ends = [_next_module(on_modal, len(on_modal) * number // workers) for number in range(workers + 1)]
    total = len(items)
    items.clear()
    for number, (start, end) in enumerate(pairwise(ends), start=1):
        items += on_modal[start:end]
        missing = max(0, total * number // workers - len(items))
        items += others[:missing]
        del others[:missing]


def _next_module(items: list[pytest.Item], index: int) -> int:
    """Returns the index of the first test from this one on with which a module begins."""
    while 0 < index < len(items) and items[index].path == items[index - 1].path:
        index += 1
    return index


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--address", help="HOST:PORT of a running server: the conformance suite tests it too")


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ModalCloud"]:
    """The stand-in of Modal's cloud that the modal client of this process finds."""
    import modal.client

    from tests.modal_cloud import ModalCloud

    with ModalCloud(tmp_path_factory.mktemp("cloud")) as cloud, pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environ.items():
            patch.setenv(name, value)
        modal.client._Client._set_env_client(None)
        yield cloud
        modal.client._Client._set_env_client(None)
        assert not cloud.unimplemented


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows what the containers on the stand-in of Modal printed during a test that failed."""
    report = yield
    fixtures = getattr(item, "funcargs", {})
    if report.failed and "cloud" in fixtures:
        report.sections.append(("What containers printed", fixtures["cloud"].printed(call.start)))
    return report
