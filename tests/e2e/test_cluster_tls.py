"""Mutual TLS on every link: command line to server, agent to server, server to agent; and tokens."""

import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from hvtest_certificates import Authority, require_openssl
from hvtest_programs import ProgramCluster
from hypervisor.v1 import cluster_pb2


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a server, an agent and an operator, and a stranger of another authority."""
    require_openssl()
    directory = tmp_path_factory.mktemp("certificates")
    ours, others = Authority(directory), Authority(directory, "other-ca")
    for name in ("server", "agent", "operator"):
        ours.pair(name)
    others.pair("stranger")
    return directory


def tls_keys(directory: Path, name: str) -> dict[str, str]:
    return {
        "tls.enabled": "true",
        "tls.cert_file": str(directory / f"{name}.crt"),
        "tls.key_file": str(directory / f"{name}.key"),
        "tls.ca_file": str(directory / "ca.crt"),
        "tls.client_auth": "require",
    }


@pytest.fixture(scope="module")
def cluster(release: Path, certificates: Path) -> Iterator[ProgramCluster]:
    """Certificates for everybody; who calls is the certificate's name."""
    tls = {
        "ca_file": str(certificates / "ca.crt"),
        "cert_file": str(certificates / "operator.crt"),
        "key_file": str(certificates / "operator.key"),
    }
    with ProgramCluster(
        release,
        server_keys=tls_keys(certificates, "server") | {"auth.mode": "certificate", "agents.tls": "true"},
        agent_keys=tls_keys(certificates, "agent"),
        context={"tls": tls},
    ) as running:
        yield running


def test_a_container_runs_over_mutual_tls(cluster: ProgramCluster, image: str) -> None:
    cluster.must("instance", "create", "safe", "--image", image, "--memory", "32MiB", "--", "sleep", "600")

    assert cluster.instance("safe")["status"] == "INSTANCE_STATUS_RUNNING"
    assert int(cluster.must("instance", "stats", "safe", "-o", "json").json()["pids"]) >= 1
    operations = cluster.must("operation", "list", "-o", "json").json()
    assert {o["principal"] for o in operations} == {"operator"}
    cluster.must("instance", "delete", "safe", "--force")
    cluster.assert_nothing_left()


def test_a_node_fetches_an_image_over_mutual_tls_and_a_stranger_does_not(
    cluster: ProgramCluster, certificates: Path
) -> None:
    archive = cluster.make_image()
    made = cluster.must("image", "import", str(archive), "--name", "busybox", "-o", "json").json()
    cluster.must(
        *("instance", "create", "web", "--image", "image:busybox", "--memory", "32MiB"),
        *("--", "sleep", "600"),
    )

    assert cluster.instance("web")["status"] == "INSTANCE_STATUS_RUNNING"
    (server,) = made["servers"]
    assert server.startswith("https://")
    context = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    with pytest.raises((ssl.SSLError, OSError)):
        urllib.request.urlopen(f"{server}/images/sha256/{made['sha256']}", context=context, timeout=10).read()
    context.load_cert_chain(certificates / "operator.crt", certificates / "operator.key")
    with urllib.request.urlopen(f"{server}/images/sha256/{made['sha256']}", context=context) as answer:
        assert len(answer.read()) == int(made["size_bytes"])
    cluster.must("instance", "delete", "web", "--force")
    cluster.must("image", "delete", "busybox")
    cluster.assert_nothing_left()


@pytest.mark.parametrize("who", ["plain text", "stranger", "nobody"])
def test_who_is_not_known_does_not_get_in(cluster: ProgramCluster, certificates: Path, who: str) -> None:
    authority = (certificates / "ca.crt").read_bytes()
    key, chain = None, None
    if who == "stranger":
        key = (certificates / "stranger.key").read_bytes()
        chain = (certificates / "stranger.crt").read_bytes()
    ports = {"server": cluster.address, "agent": f"127.0.0.1:{cluster.agent_port}"}
    for target in ports.values():
        if who == "plain text":
            channel = grpc.insecure_channel(target)
        else:
            credentials = grpc.ssl_channel_credentials(authority, key, chain)
            channel = grpc.secure_channel(target, credentials)
        with channel, pytest.raises(grpc.RpcError) as caught:
            cluster.cluster_api(channel).GetClusterInfo(cluster_pb2.GetClusterInfoRequest(), timeout=10)

        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED)
