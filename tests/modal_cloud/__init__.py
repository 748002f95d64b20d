"""A stand-in of Modal's cloud, for tests: the client library and the containers are the real ones."""

from tests.modal_cloud.clocks import with_clock
from tests.modal_cloud.cloud import ModalCloud
from tests.modal_cloud.container import Container
from tests.modal_cloud.faults import Fault
from tests.modal_cloud.state import Call
from tests.modal_cloud.tunnels import Tunnel

__all__ = ["Call", "Container", "Fault", "ModalCloud", "Tunnel", "with_clock"]
