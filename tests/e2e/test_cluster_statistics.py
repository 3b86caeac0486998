"""What a real container uses, all the way from its control group to the command line, the node and Prometheus."""

import json
import os
import re
import urllib.error
import urllib.request

from hvtest_containerd import eventually
from hvtest_programs import ProgramCluster

BUSY = ("--cpu", "0.2", "--memory", "32MiB", "--", "sh", "-c", "while :; do :; done")


def scrape(cluster: ProgramCluster) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics_port}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.URLError:
        return ""


def value(text: str, name: str, instance_id: str) -> float | None:
    found = re.search(rf'^{name}\{{instance_id="{instance_id}"[^}}]*\}} (\S+)$', text, re.MULTILINE)
    return None if found is None else float(found[1])


def watched(cluster: ProgramCluster, *more: str) -> list[dict[str, str]]:
    """Samples that a watch of two seconds prints; the command's own time limit ends it."""
    result = cluster.ctl("instance", "stats", "busy", "--watch", "-o", "json", "--timeout", "2s", *more)
    return [json.loads(line) for line in result.out.splitlines()]


def test_a_busy_container_is_seen_everywhere_and_after_a_restart_of_the_agent(
    cluster: ProgramCluster, image: str
) -> None:
    cluster.must("instance", "create", "busy", "--image", image, *BUSY)
    instance_id = str(cluster.instance("busy")["id"])

    live = watched(cluster, "--interval", "200ms")
    assert len(live) >= 5
    used = [int(sample["cpu_usage_ns"]) for sample in live]
    assert used == sorted(set(used))
    assert all(0.0 < float(s["cpu_used_cores"]) < 1.0 for s in live[2:])
    assert int(live[-1]["cpu_throttled_ns"]) > 0

    past = watched(cluster, "--interval", "200ms", "--history", "1m")
    # It begins before the first watch did, and goes on after that.
    assert int(past[0]["cpu_usage_ns"]) <= used[0]
    assert int(past[-1]["cpu_usage_ns"]) > used[-1]
    assert len(past) > len(live)

    shown = cluster.must("instance", "stats", "busy", "-o", "wide").out.splitlines()
    assert {"READ/S", "THROTTLED"} <= set(shown[0].split())

    def node_tells() -> bool:
        return "1 of 1 running instances sampled" in cluster.must("node", "get", cluster.hostname).out

    eventually(node_tells, what="the heartbeat carries what the instances use", timeout_s=30)

    before = value(scrape(cluster), "hypervisor_instance_cpu_seconds_total", instance_id)
    assert before is not None
    assert before > 0
    cluster.agent.kill()
    cluster.agent.start()
    cluster.wait_ready()

    def metrics_go_on() -> bool:
        after = value(scrape(cluster), "hypervisor_instance_cpu_seconds_total", instance_id)
        return after is not None and after > before

    eventually(metrics_go_on, what="the adopted container is sampled again", timeout_s=30)
    assert 'name="busy",project="default",type="container"' in scrape(cluster)

    cluster.must("instance", "delete", "busy", "--force")
    assert value(scrape(cluster), "hypervisor_instance_cpu_seconds_total", instance_id) is None
    pid = cluster.agent.pid
    open_files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert [name for name in open_files if instance_id in name] == []
