"""containerd's answers as errors of ours."""

from pathlib import Path

import grpc
import grpc.aio
import pytest

from hypervisor.agent.drivers.containerd.client import translate
from hypervisor.core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)


@pytest.mark.parametrize(
    ("code", "details", "kind", "reason"),
    [
        (grpc.StatusCode.NOT_FOUND, "no such thing", NotFound, "RUNTIME_OBJECT_NOT_FOUND"),
        (grpc.StatusCode.ALREADY_EXISTS, "is there", AlreadyExists, "RUNTIME_OBJECT_EXISTS"),
        (grpc.StatusCode.UNAVAILABLE, "connection refused", Unavailable, "DRIVER_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", DeadlineExceeded, "DRIVER_TIMEOUT"),
        (grpc.StatusCode.UNKNOWN, "context deadline exceeded: unknown", DeadlineExceeded, "DRIVER_TIMEOUT"),
        (grpc.StatusCode.UNKNOWN, "write /x: no space left on device", ResourceExhausted, "DISK_FULL"),
        (
            grpc.StatusCode.FAILED_PRECONDITION,
            "unexpected commit digest",
            FailedPrecondition,
            "RUNTIME_REFUSED",
        ),
        (
            grpc.StatusCode.UNKNOWN,
            "runc did not terminate successfully",
            FailedPrecondition,
            "RUNTIME_REFUSED",
        ),
    ],
)
def test_each_code_has_its_class_and_keeps_the_words(
    code: grpc.StatusCode, details: str, kind: type[HypervisorError], reason: str
) -> None:
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, None)

    translated = translate(error, "start the process of i-1", address=Path("/run/c.sock"))

    assert type(translated) is kind
    assert translated.reason == reason
    assert details in translated.metadata["details"]
    assert translated.metadata["call"] == "start the process of i-1"
