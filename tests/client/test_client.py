"""The client for threads, over the wire."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import flywheel_client
import grpc
import pytest
from flywheel_client import CallCancelledError, Client, DeadlineExceededError, Delta, Response, Sample
from flywheel_proto.v1 import generation_pb2
from grpc_health.v1 import health_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpc_health.v1.health import HealthServicer

    from tests.client.conftest import FakeService

WAIT = 20.0


@pytest.fixture
def client(fake: FakeService) -> Iterator[Client]:
    with Client(fake.address) as client:
        yield client


def test_generate_streams_samples(fake: FakeService, client: Client) -> None:
    expected = Sample(
        text="abc",
        generated_tokens=2,
        finished=1700000000.5,
        finish_reason="stop",
        index=0,
        prompt_tokens=5,
        stop_sequence="###",
    )
    assert list(client.generate("p", max_tokens=2)) == [expected]
    assert fake.requests == [generation_pb2.GenerationRequest(text="p", max_tokens=2)]


def test_generate_deltas_streams_text(client: Client) -> None:
    with client.generate_deltas("p", max_tokens=2) as deltas:
        assert list(deltas) == [
            Delta(0, "ab", 1, 0.0, "", 0, ""),
            Delta(0, "c", 2, 1700000000.5, "stop", 5, ""),
        ]
        assert list(deltas) == []


def test_generate_all_returns_a_response(client: Client) -> None:
    response = client.generate_all("p", max_tokens=2)
    assert isinstance(response, Response)
    assert (response.prompt, response.num_samples, response.prompt_tokens) == ("p", 1, 5)
    assert [sample.text for sample in response.responses] == ["abc"]


def test_model_and_stats(client: Client) -> None:
    model = client.model()
    assert (model.name, model.engine, model.context_tokens) == ("SmolLM2-135M", "fake", 2048)
    assert (model.penalizes_prompt, model.prompt_format) == (True, "chat")
    assert (model.limits.max_num_samples, model.defaults.top_k) == (16, 50)
    assert client.stats() == flywheel_client.Stats(backlog=3, num_total_runners=1, active=2, queued=1)


@pytest.mark.parametrize("status", ["SERVING", "NOT_SERVING", "UNKNOWN"])
def test_health_says_the_status(client: Client, health: HealthServicer, status: str) -> None:
    health.set("flywheel.v1.GenerationService", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    assert client.health("flywheel.v1.GenerationService") == status
    assert client.health() == "SERVING"


def test_health_of_an_unknown_service_is_an_error(client: Client) -> None:
    with pytest.raises(flywheel_client.FlywheelError) as caught:
        client.health("nobody")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_metadata_and_request_id_travel_with_the_call(fake: FakeService) -> None:
    with Client(fake.address, metadata=[("authorization", "Bearer key")]) as client:
        stream = client.generate("p", max_tokens=1, request_id="mine")
        assert stream.request_id == "mine"
        list(stream)
    assert fake.metadata[0]["authorization"] == "Bearer key"
    assert fake.metadata[0]["x-request-id"] == "mine"
    assert str(fake.metadata[0]["user-agent"]).startswith(f"flywheel-client/{flywheel_client.__version__} ")


def test_the_api_key_travels_with_the_call(fake: FakeService) -> None:
    with Client(fake.address, api_key="key!~", metadata=[("tenant", "a")]) as client:
        client.generate_all("p", max_tokens=1)
        assert "key!~" not in repr(client._connection)
    assert (fake.metadata[0]["authorization"], fake.metadata[0]["tenant"]) == ("Bearer key!~", "a")


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "schlüssel", "\x7f"])
@pytest.mark.parametrize("kind", [Client, flywheel_client.AsyncClient])
def test_a_key_that_no_header_can_hold_is_refused(kind: type[Client], key: str) -> None:
    for make in (functools.partial(kind, "localhost:1"), kind.from_modal):
        with pytest.raises(ValueError, match=r"^api_key must be one or more visible ASCII characters$"):
            make(api_key=key)


def test_the_server_may_replace_the_request_id(fake: FakeService, client: Client) -> None:
    fake.request_id = "theirs"
    stream = client.generate("p", max_tokens=1)
    list(stream)
    assert stream.request_id == "theirs"
    assert fake.metadata[0]["x-request-id"] != "theirs"


def test_channel_options_take_precedence(fake: FakeService) -> None:
    options = [("grpc.max_receive_message_length", 8)]
    with Client(fake.address, channel_options=options) as client, pytest.raises(flywheel_client.ResourceExhaustedError):
        client.generate_all("p", max_tokens=1)


def test_large_responses_arrive(fake: FakeService, client: Client) -> None:
    fake.samples[0].text = "x" * (5 << 20)
    assert len(client.generate_all("p", max_tokens=1).responses[0].text) == 5 << 20


def test_timeout_of_the_client_and_of_the_call(fake: FakeService) -> None:
    with Client(fake.address, timeout=100.0) as client:
        client.generate_all("p", max_tokens=1)
        client.generate_all("p", max_tokens=1, timeout=50.0)
        client.generate_all("p", max_tokens=1, timeout=None)
    default, call, none = fake.seconds_remaining
    assert default is not None
    assert call is not None
    assert 51 < default <= 101
    assert call <= 51
    assert none is None or none > 1e6


def test_the_deadline_ends_the_call_on_both_sides(fake: FakeService, client: Client) -> None:
    fake.hangs = True
    with pytest.raises(DeadlineExceededError, match="The deadline passed"):
        list(client.generate_deltas("p", max_tokens=1, timeout=0.2))
    with pytest.raises(DeadlineExceededError):
        client.generate_all("p", max_tokens=1, timeout=0.2)
    assert fake.cancelled.wait(WAIT)


def test_leaving_a_with_block_cancels(fake: FakeService, client: Client) -> None:
    fake.hangs = True
    with client.generate_deltas("p", max_tokens=1) as deltas:
        for _ in deltas:
            break
    assert fake.cancelled.wait(WAIT)
    assert list(deltas) == []


def test_an_exception_cancels(fake: FakeService, client: Client) -> None:
    fake.hangs = True

    def fail() -> None:
        with client.generate_deltas("p", max_tokens=1) as deltas:
            next(deltas)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert fake.cancelled.wait(WAIT)


def test_dropping_the_stream_cancels(fake: FakeService, client: Client) -> None:
    fake.hangs = True
    for _ in client.generate_deltas("p", max_tokens=1):
        break
    gc.collect()
    assert fake.cancelled.wait(WAIT)


def test_cancel_tells_who_iterates(fake: FakeService, client: Client) -> None:
    fake.hangs = True
    deltas = client.generate_deltas("p", max_tokens=1)
    next(deltas)
    next(deltas)
    timer = threading.Timer(0, deltas.cancel)
    timer.start()
    with pytest.raises(CallCancelledError) as caught:
        next(deltas)
    timer.join()
    assert caught.value.request_id == deltas.request_id
    assert fake.cancelled.wait(WAIT)


def test_closing_the_client_cancels_and_is_final(fake: FakeService) -> None:
    fake.hangs = True
    client = Client(fake.address)
    deltas = client.generate_deltas("p", max_tokens=1)
    next(deltas)
    client.close()
    with pytest.raises(CallCancelledError):
        list(deltas)
    assert fake.cancelled.wait(WAIT)
    with pytest.raises(RuntimeError, match="closed"):
        client.stats()


def test_an_interrupt_cancels_a_blocking_call(fake: FakeService) -> None:
    fake.hangs = True
    # An interrupt of grpc's own code that sends the call would leave nothing to cancel: it is to come while the thread waits.
    program = (
        "import sys, threading, time; from flywheel_client import Client\n"
        "main = threading.main_thread().ident\n"
        "def tell():\n"
        "    sys.stdin.readline()\n"
        "    while sys._current_frames()[main].f_code.co_name != 'wait': time.sleep(0.01)\n"
        "    print('waiting', flush=True)\n"
        "threading.Thread(target=tell).start()\n"
        "try: Client(sys.argv[1]).generate_all('p', max_tokens=1)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, fake.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert fake.called.wait(WAIT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(2)
        assert process.stdout.readline() == "interrupted\n"
        # The process still lives and holds its channel, so this is the cancellation and not a broken connection.
        assert fake.cancelled.wait(WAIT)
        process.communicate("")


def test_the_base_install_imports_only_what_it_needs() -> None:
    program = "import sys, flywheel_client; flywheel_client.Client; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", program]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {"grpc", "google", "flywheel_proto"} < set(modules)
    assert not {"flywheel_server", "modal", "pydantic", "click", "rich", "structlog"} & set(modules)


def test_nothing_of_grpc_exists_before_the_first_call() -> None:
    client = Client("localhost:1")
    assert not client._channels
    client.close()
