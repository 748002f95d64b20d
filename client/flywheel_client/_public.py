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
from flywheel_client._many_async import AsyncPromptResults
from flywheel_client._many_sync import PromptResults
from flywheel_client._modal import ModalDirectory, published_endpoints
from flywheel_client._records import Endpoint
from flywheel_client._request import GenerationFields, Message
from flywheel_client._results import (
    Defaults,
    Delta,
    LikelyToken,
    Limits,
    Model,
    PromptResult,
    PromptToken,
    Response,
    Sample,
    Stats,
    Token,
    Tokens,
)
from flywheel_client._retry import Retry
from flywheel_client._service_config import SERVICE_CONFIG

__all__ = [
    "SERVICE_CONFIG",
    "AsyncClient",
    "AsyncPromptResults",
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
    "LikelyToken",
    "Limits",
    "Message",
    "ModalDirectory",
    "Model",
    "PromptResult",
    "PromptResults",
    "PromptToken",
    "QuotaViolation",
    "ResourceExhaustedError",
    "Response",
    "Retry",
    "Sample",
    "Stats",
    "Stream",
    "Token",
    "Tokens",
    "UnauthenticatedError",
    "UnavailableError",
    "__version__",
    "published_endpoints",
]

for _name in __all__:
    if callable(_public := globals()[_name]):
        # Help, pickles, representations and tracebacks say what users import.
        _public.__module__ = "flywheel_client"
