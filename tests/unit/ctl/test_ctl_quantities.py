"""Sizes, processors, spans and ages."""

import pytest

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.quantities import (
    age,
    cpu_cores,
    duration_s,
    readable_bytes,
    replay_bytes,
    whole_gib,
    whole_mib,
)


@pytest.mark.parametrize(
    ("text", "mib"), [("256MiB", 256), ("1GiB", 1024), ("1.5GiB", 1536), ("512", 512), ("1048576KiB", 1024)]
)
def test_memory_is_read_in_mib(text, mib):
    assert whole_mib("spec.memory_mb", text) == mib


@pytest.mark.parametrize("text", ["", "x", "1.5", "-1", "1MB", "3000B", "1e3MiB"])
def test_memory_that_is_no_whole_number_of_mib_names_the_field(text):
    with pytest.raises(InvalidArgument) as caught:
        whole_mib("spec.memory_mb", text)

    assert caught.value.violations[0].field == "spec.memory_mb"


def test_disk_is_read_in_gib():
    assert whole_gib("spec.disk_gb", "2TiB") == 2048
    assert whole_gib("spec.disk_gb", "10") == 10


@pytest.mark.parametrize(("text", "cores"), [("2", 2.0), ("0.5", 0.5), ("250m", 0.25)])
def test_cores(text, cores):
    assert cpu_cores("spec.cpu_cores", text) == cores


@pytest.mark.parametrize("text", ["", "two", "nan", "inf", "1m m"])
def test_cores_that_are_no_number_are_refused(text):
    with pytest.raises(InvalidArgument, match=r"spec\.cpu_cores"):
        cpu_cores("spec.cpu_cores", text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1m30s", 90), ("250ms", 0.25), ("5", 5), ("0.5", 0.5)]
)
def test_durations(text, seconds):
    assert duration_s("--timeout", text) == seconds


@pytest.mark.parametrize("text", ["soon", "5 minutes", "-1s", ""])
def test_durations_that_cannot_be_read_are_refused(text):
    with pytest.raises(InvalidArgument, match="--timeout"):
        duration_s("--timeout", text)


@pytest.mark.parametrize(("text", "size"), [("all", -1), ("none", 0), ("16KiB", 16384)])
def test_replay(text, size):
    assert replay_bytes("--replay", text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (999, "999B"), (1024, "1KiB"), (1536, "1.5KiB"), (256 << 20, "256MiB"), (5 << 40, "5TiB")],
)
def test_readable_bytes(size, text):
    assert readable_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0.9, "0s"), (119, "119s"), (190, "3m10s"), (600, "10m"), (7300, "2h"), (200_000, "2d")],
)
def test_age(seconds, text):
    assert age(seconds) == text
