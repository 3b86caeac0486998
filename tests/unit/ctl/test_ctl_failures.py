"""Exit codes, and errors as text and as JSON."""

import json

import pytest

from hypervisor.core import errors
from hypervisor.core.errors import FieldViolation
from hypervisor.ctl import failures

CODES = {
    errors.InvalidArgument: 2,
    errors.NotFound: 3,
    errors.AlreadyExists: 4,
    errors.FailedPrecondition: 4,
    errors.Conflict: 4,
    errors.ResourceExhausted: 4,
    errors.PermissionDenied: 4,
    errors.Unavailable: 1,
    errors.DeadlineExceeded: 1,
    errors.Cancelled: 1,
    errors.Unauthenticated: 1,
    errors.Unimplemented: 1,
    errors.OutOfRange: 1,
    errors.Internal: 1,
}


@pytest.mark.parametrize("cls", errors.ALL_ERRORS)
def test_every_error_has_its_documented_exit_code(cls):
    assert failures.exit_code(cls("x")) == CODES[cls]
    assert CODES[cls] in failures.EXIT_CODES


def test_says_what_and_what_to_do_next():
    error = errors.NotFound("there is no instance 'x'", reason="INSTANCE_NOT_FOUND")

    assert failures.as_text(error) == (
        "Error: there is no instance 'x' (INSTANCE_NOT_FOUND)\n"
        "Next: 'hypervisor-ctl instance list' shows what there is"
    )


def test_one_wrong_field_is_one_line_and_several_are_one_line_each():
    one = errors.InvalidArgument.of_field("name", "is required")
    two = errors.InvalidArgument.of_fields((FieldViolation("a", "is wrong"), FieldViolation("b", "is bad")))

    assert failures.as_text(one) == "Error: name: is required (INVALID_FIELD)"
    assert (
        failures.as_text(two)
        == "Error: the request has 2 problems (INVALID_FIELD)\n  a: is wrong\n  b: is bad"
    )


def test_the_reason_of_each_node_is_a_line_of_its_own():
    error = errors.ResourceExhausted(
        "no node fits",
        reason="NO_NODE_FITS",
        violations=(FieldViolation("n1", "2 GiB short"), FieldViolation("n2", "cordoned")),
        metadata={"operation_id": "op-1"},
    )

    lines = failures.as_text(error).splitlines()

    assert lines[:4] == [
        "Error: no node fits (NO_NODE_FITS)",
        "  n1: 2 GiB short",
        "  n2: cordoned",
        "  operation: op-1",
    ]


def test_retry_information_is_shown():
    error = errors.Unavailable("the store is down", reason="STORE_UNAVAILABLE", retry_after_s=2.5)

    assert "it may succeed in 2.5 s" in failures.as_text(error)


def test_an_unreachable_server_leads_to_a_cluster_or_a_context():
    text = failures.as_text(errors.Unavailable("cannot be reached", reason="PEER_UNREACHABLE"))

    assert "dev up" in text
    assert "context use" in text


def test_time_that_ran_out_names_the_operation_that_goes_on():
    error = errors.DeadlineExceeded("late", metadata={"operation_id": "op-7"})

    assert failures.as_text(error).endswith("Next: it goes on: hypervisor-ctl operation wait op-7")


def test_json_has_everything_a_script_needs():
    error = errors.InvalidArgument.of_field("name", "is required")

    document = json.loads(failures.as_json(error))["error"]

    assert document == {
        "code": "InvalidArgument",
        "exit_code": 2,
        "message": "name: is required",
        "metadata": {"field": "name"},
        "reason": "INVALID_FIELD",
        "violations": [{"field": "name", "description": "is required"}],
    }
