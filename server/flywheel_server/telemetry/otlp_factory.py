"""Creates what sends traces and metrics to an OTLP receiver. Imports OpenTelemetry only then."""

from typing import TYPE_CHECKING

from flywheel_proto._extras import DISTRIBUTION

if TYPE_CHECKING:
    from flywheel_server.telemetry.otlp import Otlp


def create_otlp(endpoint: str, *, is_one_of_several: bool) -> "Otlp":
    """Returns what sends to the receiver with this URL.

    Arguments:
        endpoint: The URL; see `Otlp`.
        is_one_of_several: Whether this process is one of several of a server, which may share their environment.

    Raises:
        ValueError: A package is missing, or a variable of OpenTelemetry is wrong.
    """
    try:
        from flywheel_server.telemetry.otlp import Otlp

        return Otlp(endpoint, "flywheel-server", is_worker=is_one_of_several)
    except ImportError as error:
        raise ValueError(f"no traces: {error}; install what is missing: pip install '{DISTRIBUTION}[otel]'") from error
    except Exception as error:  # OpenTelemetry raises different errors for wrong variables
        raise ValueError(f"no traces: check the variables OTEL_*: {error}") from error
