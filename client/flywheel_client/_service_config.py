"""The service configs of the client's channels: load balancing, health checks and size limits.

`flywheel/v1/generation_grpc_service_config.json` is the policy for clients in every language. It has these parts:

- `loadBalancingConfig`: round robin over the healthy servers.
- `healthCheckConfig`: a server that is starting, draining or without its engine gets no calls while its health says so.
- `methodConfig`: gRPC retries a call only if no header of the response has arrived, and waits as long as the server asks for
  with `grpc-retry-pushback-ms`. The list of codes has CANCELLED, because gRPC itself cancels a call that reaches a server as it
  stops. It does not have RESOURCE_EXHAUSTED, because this may also mean that a message is too large.

The format is that of https://github.com/grpc/grpc/blob/master/doc/service_config.md.
"""

import json
import pkgutil
from typing import Any, Final, cast

from flywheel_proto._service_name import SERVICE_NAME

# `importlib.resources` would load modules for archives and temporary files. `pkgutil.get_data` returns None only for packages
# without files.
SERVICE_CONFIG: Final = cast("bytes", pkgutil.get_data("flywheel_proto.v1", "generation_grpc_service_config.json")).decode()
"""The service config for your own stubs: health-checked round robin and retries. Channel option: `grpc.service_config`."""

MAX_RECEIVE_STATUS_BYTES: Final = 2**16
"""The size limit for answers of GetModel, GetStats and health checks. Real answers have a few hundred bytes at most."""

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

# The clients retry by themselves, because they can read how long to wait. So `methodConfig` is replaced.
BALANCING_CONFIG: Final = json.dumps(json.loads(SERVICE_CONFIG) | _LIMITS)
"""The service config of the clients' channels to a target."""

ENDPOINT_CONFIG: Final = json.dumps(_LIMITS)
"""The service config of the clients' channels to an endpoint of a directory."""
