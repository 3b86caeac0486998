"""Images on the wire; what a node is told must not become a path or an address unchecked."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.images import Image, ImageKind, ImageSource
from hypervisor.v1 import image_pb2
from hypervisor.wire.images import image_to_wire, source_from_wire, source_to_wire

DIGEST = "ab" * 32


@given(st.sampled_from(ImageKind), st.integers(1, 1 << 60), st.lists(st.text(max_size=20), max_size=4))
def test_a_source_survives(kind: ImageKind, size: int, servers: list[str]) -> None:
    source = ImageSource(
        name="debian-12", kind=kind, format="raw", size_bytes=size, sha256=DIGEST, servers=tuple(servers)
    )

    wire = agent_pb2.ImageSource.FromString(source_to_wire(source).SerializeToString())

    assert source_from_wire(wire, "images[0]") == source


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("name", {"name": "../x"}),
        ("sha256", {"sha256": "../../etc/passwd"}),
        ("sha256", {"sha256": DIGEST.upper()}),
        ("sha256", {"sha256": DIGEST + "\n"}),
        ("size_bytes", {"size_bytes": 0}),
        ("size_bytes", {"size_bytes": -1}),
        ("format", {"format": ""}),
        ("format", {"format": "raw\n"}),
        ("format", {"format": "x" * 33}),
        ("kind", {"kind": 0}),
        ("kind", {"kind": 77}),
        ("servers", {"servers": ["http://x"] * 65}),
    ],
)
def test_a_wrong_source_is_refused_by_its_field(field: str, change: dict[str, object]) -> None:
    legal = {
        "name": "debian-12",
        "kind": image_pb2.IMAGE_KIND_DISK,
        "format": "raw",
        "size_bytes": 1,
        "sha256": DIGEST,
    }
    wire = agent_pb2.ImageSource(**legal | change)  # type: ignore[arg-type]

    with pytest.raises(InvalidArgument) as caught:
        source_from_wire(wire, "images[3]")

    assert caught.value.metadata["field"] == f"images[3].{field}"


def test_an_image_is_shown_whole() -> None:
    image = Image(
        id="img-1",
        name="debian-12",
        project="default",
        kind=ImageKind.DISK,
        format="qcow2",
        size_bytes=5,
        sha256=DIGEST,
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        created_by="alice",
        virtual_size_bytes=7,
        holders=("st-1",),
    )

    wire = image_to_wire(image, resource_version=9, servers=["http://10.0.0.1:8080"])

    unset = [field.name for field in wire.DESCRIPTOR.fields if not getattr(wire, field.name)]
    assert unset == []
    assert list(wire.servers) == ["http://10.0.0.1:8080"]
