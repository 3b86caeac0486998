"""``node evacuate``, ``node fencing`` and the options of availability: what is sent, and what is shown."""

from hypervisor.v1 import instance_pb2, node_pb2


def test_evacuate_needs_a_word_or_shows_a_plan(ctl, server):
    node = server.add_node("node-1").hostname

    refused = ctl("node", "evacuate", node)
    plan = ctl("node", "evacuate", node, "--dry-run")
    done = ctl("node", "evacuate", node, "--confirm-dead")

    assert refused.code == 2
    assert "--confirm-dead" in refused.err
    assert f"web -> {node}" in plan.out
    assert "db: no node fits" in plan.out
    assert "nothing was changed" in plan.out
    assert done.code == 0
    assert "is being done" in done.out


def test_fencing_is_switched_off_and_on_and_shown(ctl, server):
    node = server.add_node("node-1").hostname
    found = next(n for n in server.nodes.values() if n.hostname == node)
    found.fencing.state = node_pb2.FENCING_STATE_ARMED

    off = ctl("node", "fencing", "disarm", node, "--reason", "switch swap")
    shown = ctl("node", "get", node)
    on = ctl("node", "fencing", "arm", node)

    assert "disarm" in off.out
    assert "armed,to be disarmed" in shown.out
    assert "arm its fencing" in on.out
    assert not found.fencing.disarm_requested


def test_availability_is_sent_by_options_and_manifests(ctl, server, tmp_path):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(
        "{name: db, type: container, spec: {image: busybox, availability: {on_node_loss: restart_in_place}}}"
    )

    by_option = ctl(
        "instance",
        "create",
        "web",
        "--image",
        "busybox",
        "--on-node-loss",
        "reschedule",
        "--on-partition",
        "stop",
    )
    by_file = ctl("instance", "create", "-f", str(manifest))
    assert (by_option.code, by_file.code) == (0, 0)

    specs = {i.name: i.spec.availability for i in server.instances.values()}
    assert specs["web"].on_node_loss == instance_pb2.ON_NODE_LOSS_RESCHEDULE
    assert specs["web"].on_partition == instance_pb2.ON_PARTITION_STOP
    assert specs["db"].on_node_loss == instance_pb2.ON_NODE_LOSS_RESTART_IN_PLACE
    assert "reschedule" in ctl("instance", "get", "web").out
