"""The service config of gRPC for the generation service: how its calls are spread over servers, and tried again.

The format is that of https://github.com/grpc/grpc/blob/master/doc/service_config.md.
"""

import json
from typing import Any, Final

from flywheel_proto.v1 import generation_pb2

_SERVICE: Final = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name

_BALANCING: Final[dict[str, Any]] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A server that is starting, draining or without its engine gets no calls for as long as its health says so.
    "healthCheckConfig": {"serviceName": _SERVICE},
}

BALANCING_CONFIG: Final = json.dumps(_BALANCING)
"""What the channels of the clients have. Their retries are the client's own, which can read how long to wait."""

SERVICE_CONFIG: Final = json.dumps(
    _BALANCING
    | {
        "methodConfig": [
            {
                "name": [{"service": _SERVICE}],
                # gRPC tries again only where no header of the response has arrived, and waits as long as the server asks
                # for with grpc-retry-pushback-ms. CANCELLED is how grpc itself ends a call that reaches a server in the moment
                # when it stops. RESOURCE_EXHAUSTED may also mean that a message is too large: not here.
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.25s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ]
    }
)
"""For stubs of your own: health-checked round robin and a retry policy, as the channel option `grpc.service_config`."""
