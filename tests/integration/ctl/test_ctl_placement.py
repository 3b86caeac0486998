"""The commands that tell of placements: explain, dry runs, capacity, taints."""

import pytest

from hypervisor.v1 import instance_pb2
from hypervisor.v1.instance_pb2 import LabelConstraint

SPEC = "type: container\nspec: {image: x, cpu_cores: 1}\n"


def test_explain_shows_the_record_the_comparison_and_the_node_asked_for(server, ctl):
    server.add_node("node-1")
    server.add_node("node-2", schedulable=False)
    server.add_instance("web")

    done = ctl("instance", "explain", "web", "--node", "node-2")

    assert done.code == 0, done.err
    assert "1 of 2 fit" in done.out
    assert "by default, score 290000" in done.out
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith("1 ")]
    assert rows == [["1", "node-1", "290000", "900x100", "1000x200"]]
    assert "schedulable: 1 node, such as node-2: is cordoned" in done.out
    assert done.out.endswith("Node node-2 does not fit:\n  schedulable: is cordoned\n")


def test_explain_in_full_as_json(server, ctl):
    server.add_node("node-1")
    server.add_instance("web")

    found = ctl("instance", "explain", "web", "-o", "json").json

    assert found["best_node_id"] == found["node_id"]
    assert [part["name"] for part in found["nodes"][0]["parts"]] == ["utilisation", "penalty"]


def test_a_dry_run_shows_why_that_node(server, ctl):
    server.add_node("node-1")

    done = ctl("instance", "create", "web", "--image", "x", "--dry-run")

    assert (done.code, server.instances) == (0, {})
    first, *rest = done.out.splitlines()
    assert first.endswith("(dry run: nothing was made)")
    assert any("node-1" in line and "900x100" in line for line in rest)


def test_a_dry_run_that_fits_nowhere_shows_every_check_and_fails_as_a_create_does(server, ctl):
    server.add_node("node-1", schedulable=False)

    done = ctl(
        "instance", "create", "web", "--image", "x", "--memory", "2TiB", "--dry-run", "--node", "node-1"
    )

    assert done.code == 4
    assert "none fits" in done.out
    assert "Node node-1 does not fit:\n  schedulable: is cordoned" in done.out
    assert "no node fits web" in done.err


def test_capacity_says_how_many_where_and_what_ends_it(server, ctl, tmp_path):
    server.add_node("node-1")
    server.add_node("node-2")
    server.add_node("node-3", schedulable=False)
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)

    done = ctl("cluster", "capacity", "-f", str(file))
    limited = ctl("cluster", "capacity", "-f", str(file), "--count-limit", "4")
    quiet = ctl("cluster", "capacity", "-f", str(file), "-q")

    few = ctl("cluster", "capacity", "-f", str(file), "--nodes", "1")

    assert done.code == 0, done.err
    assert few.out.endswith("and 1 more nodes; of all 2, by what ends it there: resources 2\n")
    assert done.out.splitlines()[0] == "6 more fit"
    assert "needs 1 cores, 0 free of 3" in done.out
    assert limited.out.splitlines()[0] == "4 or more (counting ended there) fit"
    assert quiet.out == "6\n"
    assert server.instances == {}


def test_capacity_wants_one_instance(server, ctl, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(f"{SPEC}---\n{SPEC}")

    done = ctl("cluster", "capacity", "-f", str(file))

    assert done.code == 2
    assert "describes 2 instances: give one" in done.err


def test_taints_come_and_go(server, ctl):
    node = server.add_node("node-1")

    done = ctl("node", "taint", "node-1", "gpu=yes:no_schedule")
    shown = ctl("node", "get", "node-1")
    gone = ctl("node", "untaint", "node-1", "gpu")
    again = ctl("node", "untaint", "node-1", "gpu")
    wrong = ctl("node", "taint", "node-1", "gpu")

    assert (done.code, done.out) == (0, "node node-1 tainted\n")
    assert "gpu=yes:no_schedule" in shown.out
    assert (gone.code, list(node.taints)) == (0, [])
    assert again.code == 3
    assert wrong.code == 2
    assert "KEY:EFFECT" in wrong.err


def test_a_node_on_which_placements_fail_is_shown_so(server, ctl):
    node = server.add_node("node-1")
    node.placement_health.penalty = 430
    node.placement_health.failures = 3
    node.placement_health.last_failure = "the disk is full"
    node.placement_health.last_failure_at.seconds = server.now_s

    listed = ctl("node", "list")
    shown = ctl("node", "get", "node-1")

    assert "ready,placements fail" in listed.out
    assert "the last 3 failed: ranked down by 430 of 1000" in shown.out
    assert "the disk is full" in shown.out


def test_options_describe_where_an_instance_wants_to_be(server, ctl):
    server.add_node("node-1")

    done = ctl(
        *("instance", "create", "web", "--image", "x", "--tolerate", "gpu", "--tolerate", "a=b:no_schedule"),
        *(
            "--affinity",
            "app=db@hypervisor/zone",
            "--anti-affinity",
            "app in (web, api)",
            "--spread",
            "app=web",
        ),
    )

    assert done.code == 0, done.err
    spec = next(iter(server.instances.values())).spec
    assert [(t.key, t.operator, t.value, t.effect) for t in spec.tolerations] == [
        ("gpu", instance_pb2.Toleration.OPERATOR_EXISTS, "", 0),
        ("a", instance_pb2.Toleration.OPERATOR_EQUAL, "b", instance_pb2.TAINT_EFFECT_NO_SCHEDULE),
    ]
    db = LabelConstraint(key="app", operator=LabelConstraint.OPERATOR_IN, values=["db"])
    assert [(t.topology, list(t.selector)) for t in spec.affinity] == [("hypervisor/zone", [db])]
    assert list(spec.anti_affinity[0].selector[0].values) == ["web", "api"]
    assert spec.spread[0].topology == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tolerate", "gpu:never"], "EFFECT is one of no_schedule, prefer_no_schedule"),
        (["--affinity", "app in web"], "spec.affinity"),
        (["--spread", ""], "spec.spread"),
    ],
)
def test_terms_that_cannot_be_read_are_told(server, ctl, options, said):
    done = ctl("instance", "create", "web", "--image", "x", *options)

    assert done.code == 2
    assert said in done.err
