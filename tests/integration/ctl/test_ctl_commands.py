"""The commands over real gRPC, against a strict double of the server."""

import json
import threading

import pytest

from hypervisor.core import errors
from hypervisor.ctl import output
from hypervisor.v1 import instance_pb2


@pytest.fixture(autouse=True)
def fixed_time(server, monkeypatch):
    from hypervisor.ctl.commands import events, instance_views, nodes, operations  # noqa: F401

    for module in (output, instance_views, nodes, operations):
        monkeypatch.setattr(module, "now_s", lambda: float(server.now_s))


def test_list_shows_the_host_name_of_the_node(server, ctl):
    server.add_node("node-1")
    server.add_instance("web")

    done = ctl("instance", "list")

    assert done.code == 0
    assert done.out.splitlines() == [
        "NAME   TYPE        STATUS    NODE     CPU   MEMORY   IMAGE     AGE",
        "web    container   running   node-1   0.5   256MiB   busybox   90s",
    ]


def test_list_goes_through_all_pages_and_stops_at_a_limit(server, ctl):
    for number in range(2300):
        server.add_instance(f"i{number:04d}")

    everything = ctl("instance", "list", "-q")
    some = ctl("instance", "list", "-q", "--limit", "1500")

    assert everything.out.split() == [f"i{number:04d}" for number in range(2300)]
    assert len(some.out.split()) == 1500
    assert [request.page_size for request in server.called("ListInstances")[-2:]] == [1000, 500]


def test_filter_and_order_are_the_servers(server, ctl):
    server.add_node("node-1")
    for name in ("a1", "a2", "b1"):
        server.add_instance(name)

    done = ctl(
        "instance",
        "list",
        "-q",
        "--filter",
        "name=a*",
        "--status",
        "running",
        "--node",
        "node-1",
        "--sort",
        "name desc",
    )

    assert done.out.split() == ["a2", "a1"]
    request = server.called("ListInstances")[-1]
    node_id = next(iter(server.nodes))
    assert (request.filter, request.order_by) == (f"name=a*,status=running,node_id={node_id}", "name desc")


def test_a_filter_the_server_does_not_know_is_wrong_usage(server, ctl):
    done = ctl("instance", "list", "--filter", "colour=red")

    assert done.code == 2
    assert "'colour=red'" in done.err


def test_get_tells_what_the_driver_cannot_do(server, ctl):
    server.add_node("node-1")
    server.add_instance("web", runtime="containerd 1.6.20")

    done = ctl("instance", "get", "web")

    assert "Node:     node-1 (" in done.out
    assert (
        "Not offered by the driver containerd on this node:\n  migrate: containers stay where they are"
        in done.out
    )


def test_get_of_nothing_ends_with_3(server, ctl):
    done = ctl("instance", "get", "nope")

    assert done.code == 3
    assert "there is no instance 'nope'" in done.err


def test_errors_are_json_where_answers_are(server, ctl):
    done = ctl("-o", "json", "instance", "get", "nope")

    assert done.out == ""
    assert json.loads(done.err)["error"]["reason"] == "INSTANCE_NOT_FOUND"


def test_create_sends_what_was_typed(server, ctl):
    server.add_node("node-1")

    done = ctl(
        *(
            "instance",
            "create",
            "web",
            "--image",
            "busybox",
            "--cpu",
            "500m",
            "--memory",
            "1GiB",
            "--disk",
            "2",
        ),
        *("-e", "A=b=c", "-l", "app=web", "--selector", "zone in (a,b)", "--node", "node-1", "--pids", "9"),
        *("--workdir", "/srv", "--placement", "binpack", "--stopped", "--", "sh", "-c", "echo --hi"),
    )

    assert done.code == 0
    assert done.out.startswith("instance web created (stopped, i-")
    sent = server.called("CreateInstance")[0].instance
    assert sent.type == instance_pb2.INSTANCE_TYPE_CONTAINER
    assert sent.desired_state == instance_pb2.DESIRED_STATE_STOPPED
    assert dict(sent.labels) == {"app": "web"}
    spec = sent.spec
    assert (spec.cpu_cores, spec.memory_mb, spec.disk_gb, spec.pids_limit) == (0.5, 1024, 2, 9)
    assert (spec.working_dir, spec.node) == ("/srv", "node-1")
    assert list(spec.command) == ["sh", "-c", "echo --hi"]
    assert dict(spec.env) == {"A": "b=c"}
    assert list(spec.node_selector[0].values) == ["a", "b"]


def test_what_is_not_given_is_left_to_the_server(server, ctl):
    ctl("instance", "create", "web", "--image", "busybox")

    spec = server.called("CreateInstance")[0].instance.spec
    assert not spec.HasField("cpu_cores")
    assert not spec.HasField("memory_mb")


def test_wrong_options_are_told_all_at_once_and_nothing_is_sent(server, ctl):
    done = ctl(
        "instance",
        "create",
        "x",
        "--image",
        "i",
        "--cpu",
        "q",
        "--memory",
        "1x",
        "-e",
        "A",
        "--selector",
        "a in",
    )

    assert done.code == 2
    for field in ("spec.cpu_cores", "spec.memory_mb", "spec.env", "spec.node_selector"):
        assert f"  {field}: " in done.err
    assert server.called("CreateInstance") == []


def test_create_from_a_file_of_several_documents(server, ctl, tmp_path):
    server.add_node("node-1")
    file = tmp_path / "two.yaml"
    file.write_text(
        "{name: a, type: container, spec: {image: x}}\n---\n{name: b, type: container, spec: {image: x}}\n"
    )

    done = ctl("instance", "create", "-f", str(file), "-q")

    assert (done.code, done.out.split()) == (0, ["a", "b"])


def test_a_file_and_a_description_exclude_each_other(server, ctl, tmp_path):
    done = ctl("instance", "create", "web", "-f", "x.yaml", "--cpu", "1")

    assert done.code == 2
    assert "leave out NAME, --cpu" in done.err


def test_dry_run_makes_nothing(server, ctl):
    server.add_node("node-1")

    done = ctl("instance", "create", "web", "--image", "x", "--dry-run")

    assert (done.code, server.instances) == (0, {})
    assert "nothing was made" in done.out


def test_a_create_that_does_not_fit_lists_the_nodes(server, ctl):
    done = ctl("instance", "create", "web", "--image", "x", "--memory", "2TiB")

    assert done.code == 4
    assert "  node-1: 16GiB of memory, 2TiB asked for\n" in done.err
    assert "  operation: op-" in done.err


def test_verbs_on_several_instances_go_on_after_a_failure(server, ctl):
    server.add_node("node-1")
    server.add_instance("a")
    server.add_instance("b")

    done = ctl("instance", "stop", "a", "nope", "b")

    assert done.code == 3
    assert done.out.splitlines() == ["instance a stopped", "instance b stopped"]
    assert "nope: Error: there is no instance 'nope'" in done.err


def test_stop_of_a_stopped_instance_is_refused_with_4(server, ctl):
    server.add_instance("a", status=instance_pb2.INSTANCE_STATUS_STOPPED)

    done = ctl("instance", "stop", "a")

    assert (done.code, "NOT_RUNNING" in done.err) == (4, True)


def test_stop_options_are_sent(server, ctl):
    server.add_instance("a")

    ctl("instance", "stop", "a", "--grace-period", "1m", "--if-version", "7")
    ctl("instance", "delete", "a", "--force")

    sent = server.called("StopInstance")[0]
    assert (sent.stop.grace_period.seconds, sent.stop.force, sent.resource_version) == (60, False, 7)
    assert server.called("DeleteInstance")[0].force


def test_every_mutating_call_has_its_own_request_id(server, ctl):
    server.add_instance("a")

    for verb in ("stop", "start", "restart"):
        assert ctl("instance", verb, "a").code == 0

    ids = {call.request_id for _, call in server.calls if hasattr(call, "request_id")}
    assert len(ids) == 3
    assert all(len(request_id) == 36 for request_id in ids)


def test_no_wait_tells_the_operation(server, ctl):
    server.add_instance("a")
    held = server.hold("StopInstance")

    done = ctl("instance", "stop", "a", "--no-wait", "-o", "json")

    assert done.code == 0
    operation = done.json
    assert operation["done"] is False
    threading.Timer(0.3, held.set).start()
    waited = ctl("operation", "wait", operation["id"], "-o", "json")
    assert (waited.code, waited.json["state"]) == (0, "OPERATION_STATE_SUCCEEDED")


def test_time_that_runs_out_names_the_operation(server, ctl):
    server.add_instance("a")
    server.hold("StopInstance")

    done = ctl("instance", "stop", "a", "--timeout", "300ms")

    assert done.code == 1
    assert "Next: it goes on: hypervisor-ctl operation wait op-" in done.err


def test_a_lost_reply_is_settled_by_asking(server, ctl):
    server.add_node("node-1")
    server.lose_reply("CreateInstance")

    done = ctl("instance", "create", "web", "--image", "x")

    assert (done.code, done.out[:20]) == (0, "instance web created")
    assert len(server.called("CreateInstance")) == 1
    assert len(server.called("GetOperation")) == 1
    assert len(server.instances) == 1


def test_a_call_that_never_arrived_is_sent_again_with_the_same_request_id(server, ctl):
    server.add_node("node-1")
    server.refuse("CreateInstance", errors.Unavailable("gone", reason="PEER_UNREACHABLE"))

    done = ctl("instance", "create", "web", "--image", "x")

    assert done.code == 0
    first, second = server.called("CreateInstance")
    assert first.request_id == second.request_id


def test_what_the_server_refuses_for_now_is_repeated_until_it_is_not(server, ctl):
    server.add_instance("a")
    down = errors.Unavailable("the store is down", reason="STORE_UNAVAILABLE", retry_after_s=0.01)
    server.refuse("StopInstance", down, down)
    server.refuse("ListInstances", down)

    assert ctl("instance", "stop", "a").code == 0
    assert ctl("instance", "list", "-q").out == "a\n"


def test_a_failure_that_lasts_is_told_as_it_is(server, ctl):
    server.add_instance("a")
    down = errors.Unavailable("the store is down", reason="STORE_UNAVAILABLE", retry_after_s=0.01)
    server.refuse("StopInstance", *[down] * 10)

    done = ctl("instance", "stop", "a")

    assert done.code == 1
    assert "the store is down (STORE_UNAVAILABLE)" in done.err


def test_without_a_server_it_says_how_to_get_one(server, ctl):
    server.stop()

    done = ctl("instance", "list")

    assert done.code == 1
    assert "hypervisor-ctl dev up" in done.err


def test_operations_are_listed_and_shown(server, ctl):
    server.add_instance("a")
    ctl("instance", "stop", "a")
    ctl("instance", "stop", "a")

    listed = ctl("operation", "list", "--filter", "verb=stop", "-o", "json").json
    failed = ctl("operation", "get", listed[0]["id"])

    assert [item["state"] for item in listed] == ["OPERATION_STATE_FAILED", "OPERATION_STATE_SUCCEEDED"]
    assert "Error:       a does not run (NOT_RUNNING)" in failed.out


def test_waiting_for_a_failed_operation_ends_with_its_error(server, ctl):
    server.add_instance("a", status=instance_pb2.INSTANCE_STATUS_STOPPED)
    operation = ctl("instance", "stop", "a", "--no-wait", "-q").out.strip()
    found = next(iter(server.operations))

    done = ctl("operation", "wait", found)

    assert operation in (found, "a", "")
    assert (done.code, "NOT_RUNNING" in done.err) == (4, True)


def test_cancel(server, ctl):
    server.add_instance("a")
    server.hold("StopInstance")
    operation = ctl("instance", "stop", "a", "--no-wait", "-q").out.strip()

    assert "cancelled" in ctl("operation", "cancel", operation).out
    assert ctl("operation", "cancel", operation).code == 4


def test_nodes(server, ctl):
    server.add_node("node-1")

    assert ctl("node", "cordon", "node-1", "--reason", "disk").out == "node node-1 cordoned\n"
    assert "ready,cordoned" in ctl("node", "list").out
    assert ctl("node", "uncordon", "node-1").code == 0
    assert "  libvirt (vm): does not work: no libvirtd here" in ctl("node", "get", "node-1").out
    assert ctl("node", "deregister", "node-1").out == "node node-1 deregistered\n"
    assert ctl("node", "get", "node-1").code == 3


def test_cluster_info_and_version(server, ctl):
    assert "Store:           sqlite" in ctl("cluster", "info").out
    assert ctl("version", "-o", "json").json["server"] == "0.1.0"


def test_stats_once_and_watched(server, ctl):
    server.add_instance("web")

    once = ctl("instance", "stats", "web")
    watched = ctl("instance", "stats", "web", "--watch", "-o", "json")

    assert once.out.splitlines()[1].split()[:4] == ["web", "0.250", "1.50s", "3MiB"]
    assert [json.loads(line)["cpu_usage_ns"] for line in watched.out.splitlines()] == [
        "1500000000",
        "1500000001",
        "1500000002",
    ]


def test_watched_stats_may_begin_with_the_past_and_show_when_each_was(server, ctl):
    server.add_instance("web")

    watched = ctl("instance", "stats", "web", "--watch", "--history", "5m", "--interval", "2s")

    method, request = server.calls[-1]
    assert method == "WatchInstanceStats"
    assert (request.history.seconds, request.interval.seconds) == (300, 2)
    heading, first, *_ = watched.out.splitlines()
    assert heading.split()[:3] == ["NAME", "TIME", "CPU"]
    assert (len(first.split()[1]), first.split()[2]) == (10, "0.250")


@pytest.mark.parametrize("option", ["--interval", "--history"])
def test_spans_of_stats_go_with_watch(server, ctl, option):
    done = ctl("instance", "stats", "web", option, "5s")

    assert (done.code, f"{option} goes with --watch" in done.err) == (2, True)


def test_node_get_shows_what_the_instances_use(server, ctl):
    node = server.add_node("node-1")
    node.usage.sampled, node.usage.running, node.usage.cpu_used_cores = 2, 3, 1.25
    node.usage.memory_used_bytes = 3 << 20

    shown = ctl("node", "get", "node-1").out

    (line,) = [line for line in shown.splitlines() if line.startswith("Instances use:")]
    assert "1.25 cores, 3MiB memory" in line
    assert "2 of 3 running instances sampled" in line


def test_the_token_goes_with_every_call(server, ctl):
    ctl("instance", "list", "--token", "secret")

    assert ("authorization", "Bearer secret") in server.metadata


def test_unknown_commands_and_options_are_wrong_usage(server, ctl):
    mistyped = ctl("instance", "lst")
    unknown = ctl("instance", "list", "--colour")

    assert (mistyped.code, unknown.code) == (2, 2)
    assert "did you mean 'list'?" in mistyped.err
    assert "Next: hypervisor-ctl instance list --help" in unknown.err


def test_help_of_every_command_can_be_shown(server, ctl):
    from hypervisor.ctl.reference import every_command

    for path in every_command():
        done = ctl(*path, "--help")
        assert (done.code, done.out.startswith("Usage: hypervisor-ctl")) == (0, True), path
