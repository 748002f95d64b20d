"""The full name of the service, for health checks, service configs and reflection."""

from typing import Final

from flywheel_proto.v1 import generation_pb2

SERVICE_NAME: Final = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
