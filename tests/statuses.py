"""The statuses that Modal may refuse a request with, as parameters of tests."""

import pytest
from grpclib import Status

ONE_OF_EACH_KIND = {
    Status.UNAVAILABLE,
    Status.RESOURCE_EXHAUSTED,
    Status.ABORTED,
    Status.NOT_FOUND,
    Status.PERMISSION_DENIED,
    Status.DATA_LOSS,
}
"""Transient, a limit, a conflict, a thing that is gone, a refusal, and what should never be."""

STATUSES = [
    pytest.param(status, id=status.name, marks=() if status in ONE_OF_EACH_KIND else pytest.mark.thorough)
    for status in Status
    if status is not Status.OK
]
