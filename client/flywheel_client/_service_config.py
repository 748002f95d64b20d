"""The service config of the contract, as gRPC channels take it: how calls are spread over servers, and tried again.

`flywheel/v1/generation_grpc_service_config.json` is the policy for clients in every language. It has these parts:

- `loadBalancingConfig`: healthy servers in turn.
- `healthCheckConfig`: a server that is starting, draining or without its engine gets no calls while its health says so.
- `methodConfig`: gRPC tries again only if no header of the response has arrived, and waits as long as the server asks for with
  `grpc-retry-pushback-ms`. CANCELLED is how gRPC itself ends a call that reaches a server in the moment when it stops.
  RESOURCE_EXHAUSTED is not in the list, because it may also mean that a message is too large.

The format is that of https://github.com/grpc/grpc/blob/master/doc/service_config.md.
"""

import json
from importlib.resources import files
from typing import Final

SERVICE_CONFIG: Final = files("flywheel_proto.v1").joinpath("generation_grpc_service_config.json").read_text("utf-8")
"""For stubs of your own: health-checked round robin and a retry policy, as the channel option `grpc.service_config`."""

BALANCING_CONFIG: Final = json.dumps(
    {name: part for name, part in json.loads(SERVICE_CONFIG).items() if name != "methodConfig"}
)
"""What the channels of the clients have. Their retries are the client's own, which can read how long to wait."""
