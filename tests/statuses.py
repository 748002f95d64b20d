"""The statuses that Modal may refuse a request with, as parameters of tests."""

import pytest
from grpclib import Status

ONE_OF_EACH_KIND = {
    Status.UNAVAILABLE,
    Status.RESOURCE_EXHAUSTED,
    Status.NOT_FOUND,
    Status.DATA_LOSS,
}
"""Transient, a limit, a thing that is gone, and what should never be."""

STATUSES = [
    pytest.param(status, id=status.name, marks=() if status in ONE_OF_EACH_KIND else pytest.mark.thorough)
    for status in Status
    if status is not Status.OK
]
