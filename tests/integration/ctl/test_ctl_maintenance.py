"""The commands for moves, drains and budgets, against the double of the server."""

from hypervisor.v1 import instance_pb2


def test_an_instance_is_moved_as_asked(server, ctl):
    server.add_instance("web")

    done = ctl(
        "instance", "move", "web", "--node", "n-7", "--strategy", "stop", "--allow-disk-loss",
        "--healthy-after", "1500ms", "--grace-period", "2s",
    )  # fmt: skip

    assert done.code == 0
    assert done.out.startswith("instance web moved to node n-7")
    ((_, request),) = [call for call in server.calls if call[0] == "MoveInstance"]
    assert (request.node, request.strategy) == ("n-7", instance_pb2.MOVE_STRATEGY_STOP)
    assert request.allow_disk_loss
    assert request.healthy_after.ToMilliseconds() == 1500
    assert request.stop.grace_period.seconds == 2


def test_a_drain_tells_what_becomes_of_each_instance(server, ctl):
    server.add_node("node-1")
    server.add_instance("a")
    server.add_instance("b")

    done = ctl(
        "node", "drain", "node-1", "--parallel", "3", "--force", "--deadline", "5m", "--give-up-after", "1h",
        "--strategy", "vm=live", "--strategy", "container=stop", "--reason", "disk",
    )  # fmt: skip

    assert done.code == 0
    assert done.out == "node node-1 drained: 2 of 2 moved; nothing runs on it any more\n"
    assert [line for line in done.err.splitlines() if line.startswith("instance")] == [
        "instance a moved",
        "instance b moved",
    ]
    (request,) = server.drains
    assert (request.parallel, request.force, request.reason) == (3, True, "disk")
    assert (request.deadline.seconds, request.timeout.seconds) == (300, 3600)
    assert dict(request.strategies) == {
        "vm": instance_pb2.MOVE_STRATEGY_LIVE,
        "container": instance_pb2.MOVE_STRATEGY_STOP,
    }


def test_one_strategy_for_all_types(server, ctl):
    server.add_node("node-1")
    assert ctl("node", "drain", "node-1", "--strategy", "replace").code == 0
    assert set(server.drains[-1].strategies) == {"vm", "container", "microvm"}

    wrong = ctl("node", "drain", "node-1", "--strategy", "disk=stop")
    assert (wrong.code, "for one type as in vm=stop" in wrong.err) == (2, True)


def test_a_drain_whose_server_stops_goes_on_with_the_same_request(server, ctl):
    server.add_node("node-1")
    server.add_instance("a")
    server.cut_drains = 1

    done = ctl("node", "drain", "node-1")

    assert done.code == 0
    assert len(server.drains) == 2
    assert len({request.request_id for request in server.drains}) == 1


def test_a_plan_is_a_table(server, ctl):
    node = server.add_node("node-1")
    server.add_instance("a")

    done = ctl("node", "drain", "node-1", "--dry-run")

    assert done.out.splitlines()[0].split() == ["NAME", "STATE", "STRATEGY", "TO", "NODE", "MESSAGE"]
    assert done.out.splitlines()[1].split()[:4] == ["a", "planned", "replace", node.hostname]
    assert "1 would go" in done.err
    as_json = ctl("node", "drain", "node-1", "--dry-run", "-o", "json").json
    assert [one["name"] for one in as_json["instances"]] == ["a"]


def test_a_watched_drain_that_failed_is_a_failure(server, ctl):
    server.add_node("node-1")

    done = ctl("node", "drain", "node-1", "--watch")

    assert (done.code, "could not be moved" in done.err) == (4, True)


def test_a_drain_is_begun_and_left_alone_or_cancelled(server, ctl):
    server.add_node("node-1")
    server.add_instance("a")

    begun = ctl("node", "drain", "node-1", "--no-wait")
    cancelled = ctl("node", "drain", "node-1", "--cancel")

    assert begun.out == "node node-1: goes on as operation op-1\n"
    assert (cancelled.code, server.cancelled_drains) == (0, ["node-1"])
    both = ctl("node", "drain", "node-1", "--cancel", "--watch")
    assert (both.code, "give one of" in both.err) == (2, True)


def test_uncordon_brings_instances_home(server, ctl):
    server.add_node("node-1")

    done = ctl("node", "uncordon", "node-1", "--restore", "--give-up-after", "1m")

    assert done.out.startswith("node node-1 uncordoned, and its instances are home: 1 of 1 moved")
    assert server.drains[-1].timeout.seconds == 60
    assert ctl("node", "uncordon", "node-1", "--restore", "--if-version", "3").code == 2


def test_budgets(server, ctl):
    made = ctl("budget", "set", "web", "--selector", "app=web", "--max-unavailable", "1")
    assert (made.code, made.out) == (0, "budget web set: 3 of 3 run, 1 more may go\n")
    (found,) = server.budgets.values()
    assert (found.selector[0].key, list(found.selector[0].values)) == ("app", ["web"])

    listed = ctl("budget", "list")
    assert listed.out.splitlines()[1].split()[:6] == ["web", "app", "in", "(web)", "at", "most"]
    assert ctl("budget", "delete", "web").out == "budget web deleted\n"
    assert ctl("budget", "delete", "web").code == 3
    neither = ctl("budget", "set", "web", "--selector", "app=web")
    assert (neither.code, "exactly one of" in neither.err) == (2, True)
