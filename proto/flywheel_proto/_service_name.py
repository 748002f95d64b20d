"""The name of the service, as health checks, service configurations and reflection use it."""

from typing import Final

from flywheel_proto.v1 import generation_pb2

SERVICE_NAME: Final = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
