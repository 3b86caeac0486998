"""Who is let in: tokens and client certificates over real TLS, at the gRPC API and at the HTTP gateway."""

import shutil
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from hvtest_certificates import Authority, Pair
from hvtest_whole_cluster import container, failure_of, whole_server
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.tls import ClientAuth, ClientTls, ServerTls, channel_credentials, server_credentials
from hypervisor.v1 import cluster_pb2, operation_pb2

TOKEN = "0123456789abcdef"
INFO = cluster_pb2.GetClusterInfoRequest()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (Debian: apt-get install openssl)")
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.pair("server")


def tls_keys(authority: Authority, pair: Pair) -> list[str]:
    return [
        "tls.enabled=true",
        f"tls.cert_file={pair.cert_file}",
        f"tls.key_file={pair.key_file}",
        f"tls.ca_file={authority.ca_file}",
    ]


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code(), failure_of(failed.value).reason


async def test_a_token_is_wanted_and_names_the_caller(tmp_path: Path) -> None:
    async with whole_server(tmp_path, "auth.mode=token", f"auth.tokens=ann={TOKEN}") as server:
        cluster = server.cluster
        assert await refusal(cluster.GetClusterInfo(INFO)) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "TOKEN_MISSING",
        )
        wrong = (("authorization", "Bearer xxxxxxxxxxxxxxxx"),)
        assert await refusal(cluster.GetClusterInfo(INFO, metadata=wrong)) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "TOKEN_UNKNOWN",
        )
        right = (("authorization", f"Bearer {TOKEN}"),)
        assert (await cluster.GetClusterInfo(INFO, metadata=right)).version == "1.2.3"

        planned = container("web")
        planned.validate_only = True
        code, reason = await refusal(server.compute.CreateInstance(planned, metadata=right))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_NODE_FITS")
        streaming = cluster.WatchEvents(cluster_pb2.WatchEventsRequest())
        assert await refusal(streaming.read()) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_metrics_want_the_token_and_health_does_not(tmp_path: Path) -> None:
    async with (
        whole_server(tmp_path, "auth.mode=token", f"auth.tokens=ann={TOKEN}") as server,
        aiohttp.ClientSession(f"http://{server.addresses.http}") as http,
    ):
        assert (await http.get("/healthz")).status == 200
        assert (await http.get("/readyz")).status == 200
        refused = await http.get("/metrics")
        assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        allowed = await http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        assert allowed.status == 200


async def test_the_certificates_name_is_the_caller(tmp_path: Path, authority: Authority, pair: Pair) -> None:
    ann = authority.pair("ann")
    credentials = channel_credentials(ClientTls(authority.ca_file, ann.cert_file, ann.key_file))
    keys = [*tls_keys(authority, pair), "tls.client_auth=require", "auth.mode=certificate"]
    async with whole_server(tmp_path, *keys, credentials=credentials) as server:
        await refusal(server.compute.CreateInstance(container("web", request_id="r1")))
        planned = await server.operations.ListOperations(operation_pb2.ListOperationsRequest())
        assert planned.operations == []
        await server.cluster.GetClusterInfo(INFO)

        context = ssl.create_default_context(cafile=str(authority.ca_file))
        context.load_cert_chain(ann.cert_file, ann.key_file)
        async with aiohttp.ClientSession(f"https://{server.addresses.http}") as http:
            assert (await http.get("/metrics", ssl=context)).status == 200
            without = ssl.create_default_context(cafile=str(authority.ca_file))
            with pytest.raises(aiohttp.ClientError):
                await http.get("/healthz", ssl=without)


async def test_who_has_no_or_a_strangers_certificate_does_not_get_through_the_handshake(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "other").pair("mallory")
    keys = [*tls_keys(authority, pair), "tls.client_auth=require", "auth.mode=certificate"]
    for tls in (
        ClientTls(authority.ca_file),
        ClientTls(authority.ca_file, stranger.cert_file, stranger.key_file),
    ):
        async with whole_server(tmp_path, *keys, credentials=channel_credentials(tls)) as server:
            code, _ = await refusal(server.cluster.GetClusterInfo(INFO, timeout=5))
            assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_trusts_another_authority_does_not_talk_to_us(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "other")
    credentials = channel_credentials(ClientTls(other.ca_file))
    async with whole_server(tmp_path, *tls_keys(authority, pair), credentials=credentials) as server:
        code, _ = await refusal(server.cluster.GetClusterInfo(INFO, timeout=5))
        assert code is grpc.StatusCode.UNAVAILABLE


def test_wrong_tls_files_are_named_before_anything_listens(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    other = authority.pair("another")
    text = tmp_path / "text"
    text.write_text("not a certificate")

    with pytest.raises(InvalidArgument, match=r"missing\.crt cannot be read: No such file"):
        server_credentials(ServerTls(tmp_path / "missing.crt", pair.key_file))
    with pytest.raises(InvalidArgument, match="do not belong together"):
        server_credentials(ServerTls(pair.cert_file, other.key_file))
    with pytest.raises(InvalidArgument, match="are not an unencrypted PEM certificate and key"):
        server_credentials(ServerTls(text, pair.key_file))
    with pytest.raises(InvalidArgument, match="holds no PEM certificate"):
        channel_credentials(ClientTls(text))
    with pytest.raises(InvalidArgument, match=r"needs tls\.ca_file"):
        server_credentials(ServerTls(pair.cert_file, pair.key_file, None, ClientAuth.REQUIRE))
    with pytest.raises(InvalidArgument, match="give both or neither"):
        channel_credentials(ClientTls(authority.ca_file, pair.cert_file))
