from hypothesis import given
from hypothesis import strategies as st

from hypervisor.server.api.digest import payload_digest
from hypervisor.v1 import compute_pb2, instance_pb2

labels = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=8)


def create(
    labels: dict[str, str], *, request_id: str = "", no_wait: bool = False
) -> compute_pb2.CreateInstanceRequest:
    return compute_pb2.CreateInstanceRequest(
        request_id=request_id, no_wait=no_wait, instance=instance_pb2.Instance(name="a", labels=labels)
    )


@given(labels)
def test_neither_request_id_nor_waiting_nor_the_order_of_maps_counts(labels: dict[str, str]) -> None:
    turned = dict(reversed(labels.items()))

    assert payload_digest(create(labels)) == payload_digest(create(turned, request_id="r", no_wait=True))


@given(labels, labels)
def test_another_payload_has_another_digest(one: dict[str, str], other: dict[str, str]) -> None:
    assert (payload_digest(create(one)) == payload_digest(create(other))) == (one == other)


def test_the_same_fields_of_another_verb_have_another_digest() -> None:
    start = compute_pb2.StartInstanceRequest(instance="a")
    restart = compute_pb2.RestartInstanceRequest(instance="a")

    assert start.SerializeToString() == restart.SerializeToString()
    assert payload_digest(start) != payload_digest(restart)


def test_the_digest_is_the_same_in_every_version_of_this_program() -> None:
    assert payload_digest(create({"b": "2", "a": "1"})) == (
        "73f070822f1ff1a7a61ba7d88c50a6435adfcc2cb9d143b3500daffc66bce06a"
    )


def test_the_request_is_left_as_it_was() -> None:
    request = create({}, request_id="r", no_wait=True)

    payload_digest(request)

    assert (request.request_id, request.no_wait) == ("r", True)
