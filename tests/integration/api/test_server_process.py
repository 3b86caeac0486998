"""The server's life: start, health, readiness, reflection, metrics, stop; and its command line, as a process."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hvtest_agent_waiting import within
from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of, whole_agent, whole_server
from hypervisor.core.errors import FailedPrecondition
from hypervisor.server.api.service import SERVICE_NAMES
from hypervisor.v1 import cluster_pb2, compute_pb2, operation_pb2


async def test_health_says_serving_for_every_service_until_the_stop(server: WholeServer) -> None:
    stub: Any = health_pb2_grpc.HealthStub(server.channel)
    for name in ("", *SERVICE_NAMES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

    server.stop.set()

    told = await within(watch.read(), what="health changes")
    assert told.status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_reflection_shows_the_services_and_their_files(server: WholeServer) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)

    async def ask(**question: str) -> Any:
        requests = [reflection_pb2.ServerReflectionRequest(**question)]
        async for answer in stub.ServerReflectionInfo(iter(requests)):
            return answer
        raise AssertionError("no answer")

    listed = await ask(list_services="")
    names = {service.name for service in listed.list_services_response.service}
    assert names == {*SERVICE_NAMES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    found = await ask(file_containing_symbol="hypervisor.v1.ComputeService")
    files = found.file_descriptor_response.file_descriptor_proto
    assert "hypervisor/v1/compute.proto" in {FileDescriptorProto.FromString(f).name for f in files}


async def test_the_gateway_tells_life_readiness_and_metrics(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web"))
    with pytest.raises(grpc.aio.AioRpcError):
        await server.compute.GetInstance(compute_pb2.GetInstanceRequest(instance="ghost"))
    async with aiohttp.ClientSession(f"http://{server.addresses.http}") as http:
        root = await http.get("/")
        assert (root.status, root.content_type) == (200, "text/plain")
        assert (await http.get("/healthz")).status == 200
        assert (await http.get("/readyz")).status == 200
        assert (await http.get("/nowhere")).status == 404
        metrics = await (await http.get("/metrics")).text()

    lines = metrics.splitlines()
    assert 'hypervisor_instances{status="running"} 1.0' in lines
    assert 'hypervisor_nodes{status="ready"} 1.0' in lines
    assert 'hypervisor_operations{state="succeeded"} 1.0' in lines
    assert "hypervisor_store_available 1.0" in lines
    assert 'hypervisor_rpc_duration_seconds_count{code="OK",method="CreateInstance"} 1.0' in lines
    assert 'hypervisor_rpc_duration_seconds_count{code="NOT_FOUND",method="GetInstance"} 1.0' in lines
    values = {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }
    assert values['hypervisor_cluster_memory_bytes{kind="reserved"}'] == 16 << 20
    assert values['hypervisor_cluster_cpu_cores{kind="capacity"}'] >= 1
    assert values['hypervisor_commit_duration_seconds_count{lane="placements",outcome="committed"}'] >= 1
    assert values['hypervisor_commit_decisions_total{lane="placements"}'] >= 1


async def test_a_second_server_on_the_same_port_is_refused_with_the_address(
    server: WholeServer, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    with pytest.raises(FailedPrecondition, match=r"server\.grpc_address .* cannot be listened on") as refused:
        async with whole_server(second, f"server.grpc_address={server.addresses.grpc}"):
            pass

    assert refused.value.reason == "ADDRESS_IN_USE"


async def test_a_waiting_call_is_cut_off_at_the_end_of_the_grace_time_and_its_operation_goes_on(
    tmp_path: Path,
) -> None:
    async with (
        whole_server(tmp_path, "server.shutdown_grace=300ms") as server,
        whole_agent(server, tmp_path) as agent,
    ):
        agent.driver.faults.hang("create")
        waiting = asyncio.ensure_future(server.compute.CreateInstance(container("web", request_id="r-1")))
        watching: Any = server.cluster.WatchEvents(cluster_pb2.WatchEventsRequest(send_initial=True))
        while (await within(watching.read(), what="the operation begins")).kind != "operation":
            pass
        server.stop.set()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await within(waiting, what="the call ends")
        agent.driver.faults.release("create")
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert failure_of(failed.value).reason == "SERVER_STOPPING"

    async with whole_server(tmp_path) as second:
        known = await second.operations.GetOperation(operation_pb2.GetOperationRequest(operation="r-1"))
    assert (known.verb, known.object_name) == ("create", "web")


def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "hypervisor.server", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_line_checks_and_shows_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("server:\n  grpc_adress: 127.0.0.1:1\nlog:\n  level: loud\n")

    wrong = run("config", "check", "--config", str(file))
    assert wrong.returncode == 2
    assert (
        f"{file}:2: server.grpc_adress: is not a known key; did you mean server.grpc_address?" in wrong.stderr
    )
    assert f"{file}:4: log.level:" in wrong.stderr

    file.write_text("auth: {mode: token, tokens: {ann: 0123456789abcdef}}\n")
    assert run("config", "check", "--config", str(file)).stdout == "the configuration is good\n"
    shown = run("config", "show", "--config", str(file), HYPERVISOR_LOG__LEVEL="debug")
    assert "grpc_address: 127.0.0.1:50051" in shown.stdout
    assert "interval: 10s" in shown.stdout
    assert "# log.level: environment variable HYPERVISOR_LOG__LEVEL" in shown.stdout
    assert "0123456789abcdef" not in shown.stdout
    assert "server.grpc_address (HYPERVISOR_SERVER__GRPC_ADDRESS)" in run("config", "keys").stdout


def test_help_and_version() -> None:
    assert "The control plane of a Hypervisor cluster" in run("--help").stdout
    assert run("version").stdout.strip() == "dev"


def test_an_open_address_without_authentication_does_not_start() -> None:
    refused = run("--set", "server.grpc_address=0.0.0.0:0")

    assert refused.returncode == 2
    assert "can be reached from other machines, but auth.mode: anonymous lets everybody in" in refused.stderr


def test_a_store_that_cannot_be_opened_ends_the_start_with_its_path() -> None:
    refused = run("--set", "store.path=/nowhere/at/all.db", "--set", "server.grpc_address=127.0.0.1:0")

    assert refused.returncode == 1
    assert '"event":"server_failed"' in refused.stderr
    assert "/nowhere/at/all.db" in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_sigterm_ends_the_process_cleanly(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hypervisor.server", "--set", f"store.path={tmp_path / 's.db'}"),
        *("--set", "server.grpc_address=127.0.0.1:0", "--set", "server.http_address=127.0.0.1:0"),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            while b"server_started" not in await process.stderr.readline():
                assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        _, rest = await within(process.communicate(), what="the process ends", timeout_s=15)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert process.returncode == 0
    assert b"server_stopped" in rest
    assert b"Traceback" not in rest


async def test_what_was_recorded_is_there_after_a_restart(tmp_path: Path) -> None:
    async with whole_server(tmp_path) as first, whole_agent(first, tmp_path):
        made = await first.compute.CreateInstance(container("web"))
        cluster_id = (await first.cluster.GetClusterInfo(cluster_pb2.GetClusterInfoRequest())).cluster_id

    async with whole_server(tmp_path) as second:
        shown = await second.compute.GetInstance(compute_pb2.GetInstanceRequest(instance="web"))
        info = await second.cluster.GetClusterInfo(cluster_pb2.GetClusterInfoRequest())

    assert (shown.id, info.cluster_id) == (made.object_id, cluster_id)
