"""The generated stubs of containerd's API: names on the wire, and nothing of Go in them."""

import pytest
from containerd_api.events import task_pb2
from containerd_api.services.containers.v1 import containers_pb2
from containerd_api.services.content.v1 import content_pb2
from containerd_api.services.events.v1 import events_pb2
from containerd_api.services.images.v1 import images_pb2
from containerd_api.services.leases.v1 import leases_pb2
from containerd_api.services.snapshots.v1 import snapshots_pb2
from containerd_api.services.tasks.v1 import tasks_pb2
from google.protobuf.descriptor import FileDescriptor


@pytest.mark.parametrize(
    ("file", "service", "methods"),
    [
        (
            containers_pb2.DESCRIPTOR,
            "containerd.services.containers.v1.Containers",
            {"Create", "Update", "List"},
        ),
        (
            content_pb2.DESCRIPTOR,
            "containerd.services.content.v1.Content",
            {"Write", "Read", "Abort", "Update"},
        ),
        (events_pb2.DESCRIPTOR, "containerd.services.events.v1.Events", {"Publish", "Subscribe"}),
        (images_pb2.DESCRIPTOR, "containerd.services.images.v1.Images", {"Get", "Create"}),
        (leases_pb2.DESCRIPTOR, "containerd.services.leases.v1.Leases", {"Create", "Delete"}),
        (
            snapshots_pb2.DESCRIPTOR,
            "containerd.services.snapshots.v1.Snapshots",
            {"Prepare", "Mounts", "Commit"},
        ),
        (
            tasks_pb2.DESCRIPTOR,
            "containerd.services.tasks.v1.Tasks",
            {"Create", "Start", "Wait", "ResizePty"},
        ),
    ],
)
def test_services_have_their_names_on_the_wire(file: FileDescriptor, service: str, methods: set[str]) -> None:
    found = next(iter(file.services_by_name.values()))

    assert found.full_name == service
    assert methods <= set(found.methods_by_name)
    assert file.name.startswith("containerd_api/")
    assert not [name for name in (d.name for d in file.dependencies) if "gogo" in name or "plugin" in name]


def test_maps_are_still_maps() -> None:
    container = containers_pb2.Container(id="x", labels={"a": "b"})

    assert dict(containers_pb2.Container.FromString(container.SerializeToString()).labels) == {"a": "b"}


def test_an_exit_event_is_read_by_its_field_numbers() -> None:
    # Encoded by hand after api/events/task.proto: container_id 1, id 2, pid 3, exit_status 4, exited_at 5.
    data = b"\n\x02c1\x12\x02c1\x18\xd2\t \x89\x01*\x0c\x08\xf0\x8d\xcb\xc7\x06\x10\x80\xc8\xaf\xa0\x01"

    event = task_pb2.TaskExit.FromString(data)

    assert (event.container_id, event.id, event.pid, event.exit_status) == ("c1", "c1", 1234, 137)
    assert event.exited_at.seconds > 0
