"""JSON and YAML of answers."""

import json

import yaml
from google.protobuf import any_pb2
from google.rpc import error_details_pb2

from hypervisor.ctl.display.documents import as_json, as_yaml
from hypervisor.v1.instance_pb2 import INSTANCE_STATUS_RUNNING, Instance
from hypervisor.v1.operation_pb2 import Operation


def test_fields_have_their_proto_names_and_are_always_there():
    document = json.loads(as_json(Instance(name="ü", status=INSTANCE_STATUS_RUNNING, resource_version=7)))

    assert document["name"] == "ü"
    assert document["status"] == "INSTANCE_STATUS_RUNNING"
    assert document["resource_version"] == "7"
    assert document["status_reason"] == ""
    assert "exit_code" not in document


def test_a_list_is_an_array():
    assert [item["name"] for item in json.loads(as_json([Instance(name="a"), Instance(name="b")]))] == [
        "a",
        "b",
    ]
    assert as_json([]) == "[]"


def test_one_line_for_streams():
    assert "\n" not in as_json(Instance(name="a"), indent=None)


def test_yaml_says_the_same():
    item = Instance(name="a", labels={"k": "v"})

    assert yaml.safe_load(as_yaml(item)) == json.loads(as_json(item))


def test_details_of_errors_are_shown_and_unknown_ones_left_out():
    operation = Operation(id="op-1")
    operation.error.code = 5
    known = any_pb2.Any()
    known.Pack(error_details_pb2.ErrorInfo(reason="GONE", domain="hypervisor"))
    unknown = any_pb2.Any(type_url="type.googleapis.com/other.Detail", value=b"\x00")
    operation.error.details.extend([known, unknown])

    document = json.loads(as_json(operation))

    assert [detail["reason"] for detail in document["error"]["details"]] == ["GONE"]
