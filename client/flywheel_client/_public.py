"""The public names of `flywheel_client`."""

from flywheel_proto import __version__

from flywheel_client._client_async import AsyncClient, AsyncStream
from flywheel_client._client_sync import Client, Stream
from flywheel_client._errors import (
    CallCancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    FlywheelError,
    InternalError,
    InvalidArgumentError,
    QuotaViolation,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from flywheel_client._modal import ModalDirectory, published_endpoints
from flywheel_client._records import Endpoint
from flywheel_client._request import GenerationFields
from flywheel_client._results import Defaults, Delta, Limits, Model, Response, Sample, Stats
from flywheel_client._retry import Retry
from flywheel_client._service_config import SERVICE_CONFIG

__all__ = [
    "SERVICE_CONFIG",
    "AsyncClient",
    "AsyncStream",
    "CallCancelledError",
    "Client",
    "DeadlineExceededError",
    "Defaults",
    "Delta",
    "Endpoint",
    "FailedPreconditionError",
    "FieldViolation",
    "FlywheelError",
    "GenerationFields",
    "InternalError",
    "InvalidArgumentError",
    "Limits",
    "ModalDirectory",
    "Model",
    "QuotaViolation",
    "ResourceExhaustedError",
    "Response",
    "Retry",
    "Sample",
    "Stats",
    "Stream",
    "UnauthenticatedError",
    "UnavailableError",
    "__version__",
    "published_endpoints",
]

for _name in __all__:
    if callable(_public := globals()[_name]):
        # Help, pickles, representations and tracebacks say what users import.
        _public.__module__ = "flywheel_client"
