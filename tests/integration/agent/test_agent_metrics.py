"""The agent's ``/metrics``, scraped over HTTP."""

import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hvtest_agent_waiting import within
from hvtest_certificates import Authority, require_openssl
from hypervisor.agent.metrics.http import MetricsServer
from hypervisor.agent.metrics.instances import INSTANCE_FAMILIES
from hypervisor.agent.metrics.node import NODE_FAMILIES
from hypervisor.agent.metrics.text import Family, labels_text, rendered
from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.ids import new_id
from hypervisor.core.tls import ClientAuth, ServerTls, server_ssl_context
from hypervisor.v1 import instance_pb2

StartAgent = Callable[..., Any]
_LINE = re.compile(r"(?P<name>\w+)(?P<labels>\{.*\})? (?P<value>\S+)")


def _create(name: str) -> agent_pb2.CreateInstanceRequest:
    return agent_pb2.CreateInstanceRequest(
        ref=agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=1),
        name=name,
        project="default",
        type=instance_pb2.INSTANCE_TYPE_CONTAINER,
        spec=instance_pb2.InstanceSpec(image="fake", memory_mb=64),
        start=True,
    )


async def _scrape(address: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(f"http://{address}/metrics") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        return await answer.text()


def _values(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = _LINE.fullmatch(line)
            assert match, line
            found[match["name"] + (match["labels"] or "")] = float(match["value"])
    return found


async def _told(address: str, wanted: Callable[[dict[str, float]], bool]) -> str:
    """The text of the first scrape in which what is wanted is told."""

    async def scrape() -> str:
        while True:
            text = await _scrape(address)
            if wanted(_values(text)):
                return text

    return await within(scrape(), what="the metrics tell it")


def _has_pids(values: dict[str, float]) -> bool:
    return any(name.startswith("hypervisor_instance_pids") for name in values)


async def test_the_node_and_each_instance_are_told(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        request = _create("web")
        await agent.stub.CreateInstance(request)
        series = f'{{instance_id="{request.ref.id}",name="web",project="default",type="container"}}'
        used = f"hypervisor_instance_cpu_seconds_total{series}"
        first = _values(await _told(agent.metrics_address, lambda v: v.get(used, 0.0) > 0))[used]

        values = _values(await _told(agent.metrics_address, lambda v: v[used] > first))
        assert values[f"hypervisor_instance_memory_limit_bytes{series}"] == 64 << 20
        assert values['hypervisor_agent_instances{status="running"}'] == 1
        assert values['hypervisor_agent_driver_available{driver="fake"}'] == 1
        assert values["hypervisor_agent_registered"] == 1
        assert values["hypervisor_agent_instances_without_series"] == 0
        assert values["hypervisor_node_memory_bytes"] > values["hypervisor_node_memory_used_bytes"] > 0
        assert values["hypervisor_agent_stats_samples_total"] >= 2
        assert values["process_resident_memory_bytes"] > 0

        await agent.stub.StopInstance(agent_pb2.StopInstanceRequest(ref=request.ref))
        gone = _values(await _scrape(agent.metrics_address))
        assert not [name for name in gone if request.ref.id in name]


async def test_every_name_is_one_of_the_documented(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        await agent.stub.CreateInstance(_create("web"))
        text = await _told(agent.metrics_address, _has_pids)

    types = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    ours = [(name, kind) for name, kind in types if name.startswith("hypervisor_")]
    families = {(family.name, family.kind) for family in (*NODE_FAMILIES, *INSTANCE_FAMILIES)}
    assert len(ours) == len(set(ours))
    assert set(ours) <= families
    assert {(family.name, family.kind) for family in NODE_FAMILIES} <= set(ours)


async def test_instances_beyond_the_bound_have_no_series_and_are_counted(start_agent: StartAgent) -> None:
    async with start_agent(max_series=2) as agent:
        for number in range(5):
            await agent.stub.CreateInstance(_create(f"web-{number}"))

        def series(values: dict[str, float]) -> int:
            return sum(name.startswith("hypervisor_instance_pids") for name in values)

        values = _values(await _told(agent.metrics_address, lambda v: series(v) >= 2))
        assert series(values) == 2
        assert values["hypervisor_agent_instances_without_series"] == 3


async def test_a_restarted_agent_still_knows_names_and_samples_what_runs(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        await agent.stub.CreateInstance(_create("web"))
    async with start_agent() as agent:
        text = await _told(agent.metrics_address, _has_pids)

    assert ',name="web",project="default",type="container"}' in text


async def test_an_address_in_use_is_named() -> None:
    async def text() -> bytes:
        return b""

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(FailedPrecondition, match=rf"metrics\.address {address} cannot be") as caught:
            async with MetricsServer(address, tls=None, text=text):
                pass

    assert caught.value.reason == "ADDRESS_IN_USE"


async def test_with_tls_only_holders_of_a_certificate_are_answered(tmp_path: Path) -> None:
    require_openssl()
    authority = Authority(tmp_path)
    pair, prometheus = authority.pair("node-1"), authority.pair("prometheus")
    tls = ServerTls(pair.cert_file, pair.key_file, authority.ca_file, ClientAuth.REQUIRE)

    async def text() -> bytes:
        return b"x 1\n"

    known = ssl.create_default_context(cafile=str(authority.ca_file))
    known.load_cert_chain(prometheus.cert_file, prometheus.key_file)
    stranger = ssl.create_default_context(cafile=str(authority.ca_file))
    async with (
        MetricsServer("127.0.0.1:0", tls=server_ssl_context(tls), text=text) as served,
        aiohttp.ClientSession(f"https://127.0.0.1:{served.port}") as http,
    ):
        answer = await http.get("/metrics", ssl=known)
        assert (answer.status, await answer.text()) == (200, "x 1\n")
        with pytest.raises(aiohttp.ClientError):
            await http.get("/metrics", ssl=stranger)


def test_names_are_escaped() -> None:
    labels = labels_text({"name": 'a"b\\c\nd'})

    assert rendered(Family("x", "gauge", "X."), [(labels, 1)]) == (
        '# HELP x X.\n# TYPE x gauge\nx{name="a\\"b\\\\c\\nd"} 1\n'
    )
