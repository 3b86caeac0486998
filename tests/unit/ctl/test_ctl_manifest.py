"""Instances in YAML: what is read, and every mistake with its line."""

import pytest

from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.manifest import parse_manifest
from hypervisor.v1 import instance_pb2 as pb

GOOD = """\
name: web
type: container
project: shop
labels: {app: web, tier: "1"}
desired_state: stopped
spec:
  image: busybox
  cpu_cores: 0.5
  memory: 1GiB
  disk_gb: 3
  pids_limit: 100
  command: [sh, -c, "echo 1", 5]
  env: {A: x, N: 1}
  node_selector: zone in (a, b)
  placement_policy: binpack
---
# a document with nothing in it is none
---
name: db
type: vm
spec: {kernel_path: /boot/vmlinuz}
"""


def problems(text):
    with pytest.raises(InvalidArgument) as caught:
        parse_manifest(text, "f.yaml")
    assert caught.value.reason == "MANIFEST_INVALID"
    return [(v.field, v.description) for v in caught.value.violations]


def test_reads_every_field_of_several_documents():
    web, db = parse_manifest(GOOD, "f.yaml")

    assert (web.name, web.type, web.project) == ("web", pb.INSTANCE_TYPE_CONTAINER, "shop")
    assert web.desired_state == pb.DESIRED_STATE_STOPPED
    assert dict(web.labels) == {"app": "web", "tier": "1"}
    assert (web.spec.cpu_cores, web.spec.memory_mb, web.spec.disk_gb, web.spec.pids_limit) == (
        0.5,
        1024,
        3,
        100,
    )
    assert list(web.spec.command) == ["sh", "-c", "echo 1", "5"]
    assert dict(web.spec.env) == {"A": "x", "N": "1"}
    assert [list(c.values) for c in web.spec.node_selector] == [["a", "b"]]
    assert web.spec.placement_policy == pb.PLACEMENT_POLICY_BINPACK
    assert (db.type, db.spec.kernel_path) == (pb.INSTANCE_TYPE_VM, "/boot/vmlinuz")


def test_amounts_that_are_not_given_stay_absent():
    (made,) = parse_manifest("{name: a, type: container, spec: {image: x}}", "f")

    assert not made.spec.HasField("memory_mb")
    assert not made.spec.HasField("cpu_cores")


def test_unknown_keys_name_the_nearest_one_and_the_line():
    text = "name: a\ntype: container\nspec:\n  imge: x\n  memroy: 1GiB\n"

    assert problems(text) == [
        ("f.yaml:4: spec.imge", "is not a known key: did you mean image?"),
        ("f.yaml:5: spec.memroy", "is not a known key: did you mean memory?"),
    ]


def test_all_mistakes_of_all_documents_are_told_at_once():
    text = "name: a\ntype: box\nspec: {memory: 3x}\n---\nname: b\nspec: []\n"

    found = problems(text)

    assert [field for field, _ in found] == [
        "f.yaml:2: type",
        "f.yaml:3: spec.memory",
        "f.yaml:5: type",
        "f.yaml:6: spec",
    ]
    assert "is not one of vm, container, microvm" in found[0][1]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("name: a\nname: b\ntype: vm\nspec: {}", 2, "is given twice"),
        ("name: [a]\ntype: vm\nspec: {}", 1, "must be text"),
        ("name:\ntype: vm\nspec: {}", 1, "must be text"),
        ("name: a\ntype: vm\nspec: {command: sh}", 3, "must be a list of words"),
        ("name: a\ntype: vm\nspec: {env: [A=b]}", 3, "must be a mapping"),
        ("name: a\ntype: vm\nspec: {pids_limit: many}", 3, "is not a whole number"),
        ("name: a\ntype: vm\nspec: {pids_limit: 99999999999999999999}", 3, "is out of range"),
        ("name: a\ntype: vm\nspec: {memory: 1GiB, memory_mb: 5}", 3, "says the same as memory_mb"),
        ("name: a\ntype: vm\nspec: {node_selector: 'a in'}", 3, "write KEY=VALUE"),
        ("name: a\ntype: vm\ndesired_state: deleted\nspec: {}", 3, "is not one of running, stopped"),
        ("- name: a", 1, "must be a mapping"),
        ("name: a\n  type: vm", 2, "not valid YAML"),
    ],
)
def test_mistakes_have_their_line(text, line, said):
    found = problems(text)

    assert any(field.startswith(f"f.yaml:{line}") and said in description for field, description in found), (
        found
    )


@pytest.mark.parametrize("text", ["", "---\n---\n", "# nothing\n"])
def test_a_file_without_instances_is_a_mistake(text):
    assert "holds no instance" in problems(text)[0][1]


def test_tags_that_make_objects_are_not_followed():
    text = "name: !!python/object/apply:os.system ['true']\ntype: vm\nspec: {}"

    assert problems(text)[0][0] == "f.yaml:1: name"


def test_where_an_instance_wants_to_be() -> None:
    (found,) = parse_manifest(
        """
name: web
type: container
spec:
  image: x
  tolerations: [gpu, "dedicated=web:no_schedule"]
  affinity:
    - app=db@hypervisor/zone
    - {selector: "app in (a, b)", preferred: true, weight: 50}
  anti_affinity: [app=web]
  spread: [{selector: app=web, topology: rack, weight: 7}]
""",
        "f.yaml",
    )

    spec = found.spec
    assert [(t.key, t.value) for t in spec.tolerations] == [("gpu", ""), ("dedicated", "web")]
    assert [(t.topology, t.preferred, t.weight) for t in spec.affinity] == [
        ("hypervisor/zone", False, 0),
        ("", True, 50),
    ]
    assert list(spec.affinity[1].selector[0].values) == ["a", "b"]
    assert spec.anti_affinity[0].selector[0].key == "app"
    assert (spec.spread[0].topology, spec.spread[0].weight) == ("rack", 7)


def test_mistakes_in_terms_have_their_lines() -> None:
    with pytest.raises(InvalidArgument) as wrong:
        parse_manifest(
            """name: web
type: container
spec:
  image: x
  affinity:
    - {selector: "app in", prefered: true}
    - {selector: app, preferred: maybe, weight: 101}
  tolerations: gpu
  spread: [{}]
""",
            "f.yaml",
        )

    said = {v.field: v.description for v in wrong.value.violations}
    assert "did you mean preferred?" in said["f.yaml:6: spec.affinity[0].prefered"]
    assert "f.yaml:6: spec.affinity[0].selector" in said
    assert said["f.yaml:7: spec.affinity[1].preferred"] == "must be true or false"
    assert said["f.yaml:7: spec.affinity[1].weight"] == "is 101: use 1 to 100"
    assert said["f.yaml:8: spec.tolerations"] == "must be a list"


def manifest(restart: str) -> str:
    return f"name: web\ntype: container\nspec:\n  image: busybox\n  restart: {restart}\n"


def test_a_restart_policy_is_a_word_or_a_mapping():
    (word,) = parse_manifest(manifest("on-failure"), "f.yaml")
    (mapping,) = parse_manifest(
        manifest(
            "{condition: always, max_restarts: 5, initial_delay: 500ms, max_delay: 1m, reset_after: 90}"
        ),
        "f.yaml",
    )

    assert word.spec.restart == pb.RestartPolicy(condition=pb.RESTART_CONDITION_ON_FAILURE)
    policy = mapping.spec.restart
    assert (policy.condition, policy.max_restarts) == (pb.RESTART_CONDITION_ALWAYS, 5)
    assert policy.initial_delay.ToMilliseconds() == 500
    assert (policy.max_delay.seconds, policy.reset_after.seconds) == (60, 90)


def test_mistakes_in_a_restart_policy_have_their_line():
    assert problems(manifest("sometimes")) == [
        ("f.yaml:5: spec.restart", "'sometimes' is not one of never, on-failure, always")
    ]
    found = problems(manifest("{condition: on-failure, max_restart: 3, max_delay: soon}"))
    assert [field for field, _ in found] == [
        "f.yaml:5: spec.restart.max_restart",
        "f.yaml:5: spec.restart.max_delay",
    ]
    assert "did you mean max_restarts?" in found[0][1]
