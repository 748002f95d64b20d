"""The service configs of the client's channels: how calls are spread over servers, and how large answers may be.

`flywheel/v1/generation_grpc_service_config.json` is the policy for clients in every language. It has these parts:

- `loadBalancingConfig`: healthy servers in turn.
- `healthCheckConfig`: a server that is starting, draining or without its engine gets no calls while its health says so.
- `methodConfig`: gRPC tries again only if no header of the response has arrived, and waits as long as the server asks for with
  `grpc-retry-pushback-ms`. CANCELLED is how gRPC itself ends a call that reaches a server in the moment when it stops.
  RESOURCE_EXHAUSTED is not in the list, because it may also mean that a message is too large.

The format is that of https://github.com/grpc/grpc/blob/master/doc/service_config.md.
"""

import json
import pkgutil
from typing import Any, Final, cast

from flywheel_proto._service_name import SERVICE_NAME

# `importlib.resources` would load modules for archives and temporary files. The other one returns None only for packages
# without files.
SERVICE_CONFIG: Final = cast("bytes", pkgutil.get_data("flywheel_proto.v1", "generation_grpc_service_config.json")).decode()
"""For stubs of your own: health-checked round robin and a retry policy, as the channel option `grpc.service_config`."""

MAX_RECEIVE_STATUS_BYTES: Final = 2**16
"""The largest answer of GetModel, GetStats and health checks, none of which has more than a few hundred bytes."""

_LIMITS: Final[dict[str, Any]] = {
    "methodConfig": [
        {
            "name": [
                {"service": SERVICE_NAME, "method": "GetModel"},
                {"service": SERVICE_NAME, "method": "GetStats"},
                {"service": "grpc.health.v1.Health"},
            ],
            "maxResponseMessageBytes": MAX_RECEIVE_STATUS_BYTES,
        }
    ]
}

# The clients' retries are their own, which can read how long to wait, so `methodConfig` is replaced.
BALANCING_CONFIG: Final = json.dumps(json.loads(SERVICE_CONFIG) | _LIMITS)
"""What the clients' channels to a target have."""

ENDPOINT_CONFIG: Final = json.dumps(_LIMITS)
"""What the clients' channels to an endpoint of a directory have."""
