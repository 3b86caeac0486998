"""The etcd backend over TLS, with a certificate of its own, and what it says when certificates do not fit."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvtest_certificates import Authority, require_openssl
from hvtest_etcd import EtcdServer, free_port
from hvtest_storage import apply, count_is, read_watch, unique_root
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import HypervisorError, InvalidArgument, ResourceExhausted, Unavailable
from hypervisor.server.store.config import EtcdTls, StoreConfig
from hypervisor.server.store.etcd import EtcdStorage
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import Put


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities; the first has signed etcd and a client, the second a stranger."""
    require_openssl()
    directory = tmp_path_factory.mktemp("certificates")
    ours, others = Authority(directory), Authority(directory, "other-ca")
    ours.pair("etcd", names="DNS:etcd.test")
    ours.pair("client", names="DNS:server.test")
    others.pair("stranger", names="DNS:server.test")
    return directory


@pytest.fixture(scope="module")
def etcd(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd that talks TLS to clients it knows; plain text stays for the test's own readiness check."""
    port = free_port()
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    plain = f"http://127.0.0.1:{server.port}"
    server.arguments = (
        *("--listen-client-urls", f"{plain},https://127.0.0.1:{port}", "--advertise-client-urls", plain),
        *("--cert-file", str(certificates / "etcd.crt"), "--key-file", str(certificates / "etcd.key")),
        *("--client-cert-auth", "--trusted-ca-file", str(certificates / "ca.crt")),
    )
    with server:
        server.tls_port = port
        yield server


def _config(etcd: EtcdServer, tls: EtcdTls) -> StoreConfig:
    return StoreConfig(
        backend="etcd",
        endpoints=(f"https://127.0.0.1:{etcd.tls_port}",),
        tls=tls,
        dial_timeout_s=1.0,
        request_timeout_s=2.0,
    )


def _tls(
    directory: Path, *, ca: str = "ca", client: str = "client", server_name: str = "etcd.test"
) -> EtcdTls:
    return EtcdTls(
        ca_file=str(directory / f"{ca}.crt"),
        cert_file=str(directory / f"{client}.crt") if client else "",
        key_file=str(directory / f"{client}.key") if client else "",
        server_name=server_name,
    )


async def test_commits_and_watches_over_mutual_tls(etcd: EtcdServer, certificates: Path) -> None:
    root = unique_root()
    storage = await open_storage(_config(etcd, _tls(certificates)), SystemClock())
    start = await storage.current_revision()
    revision = await apply(storage, Put(root + "k", b"secret"))
    batches = await read_watch(storage, root, after_revision=start, until=count_is(1))
    await storage.aclose()

    assert [b.revision for b in batches] == [revision]


@pytest.mark.parametrize(
    "wrong",
    [{"ca": "other-ca"}, {"client": "stranger"}, {"client": ""}, {"server_name": "elsewhere.test"}],
    ids=["unknown etcd", "unknown client", "no client certificate", "wrong name"],
)
async def test_certificate_that_does_not_fit_keeps_the_store_closed(
    etcd: EtcdServer, certificates: Path, wrong: dict[str, str]
) -> None:
    async with asyncio.timeout(20):
        with pytest.raises(Unavailable) as caught:
            await open_storage(_config(etcd, _tls(certificates, **wrong)), SystemClock())
    assert str(etcd.tls_port) in str(caught.value)


async def test_missing_certificate_file_is_named(etcd: EtcdServer, certificates: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await open_storage(_config(etcd, _tls(certificates, client="nobody")), SystemClock())
    assert "nobody" in str(caught.value)


@pytest.mark.parametrize(
    ("endpoints", "tls"),
    [
        ((), None),
        (("localhost",), None),
        (("https://localhost:2379",), None),
        (("http://localhost:2379",), EtcdTls()),
        (("unix:///run/etcd",), None),
    ],
)
async def test_bad_endpoints_are_refused_by_name(endpoints: tuple[str, ...], tls: EtcdTls | None) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await open_storage(StoreConfig(backend="etcd", endpoints=endpoints, tls=tls), SystemClock())
    assert caught.value.metadata["field"] == "store.endpoints"


async def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="etcd, memory, sqlite"):
        await open_storage(StoreConfig(backend="postgres"), SystemClock())


async def test_nothing_listening_is_unavailable_within_the_dial_time_out() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    config = StoreConfig(backend="etcd", endpoints=(endpoint,), dial_timeout_s=0.5)
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable) as caught:
            await open_storage(config, SystemClock())
    assert endpoint in str(caught.value)
    assert caught.value.reason == "STORE_UNAVAILABLE"


async def test_exhausted_quota_is_told_and_writes_nothing(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "etcd", arguments=("--quota-backend-bytes", "2000000")) as server:
        config = StoreConfig(backend="etcd", endpoints=(server.endpoint,))
        storage = await EtcdStorage.open(config, clock=SystemClock())
        error: HypervisorError | None = None
        applied: list[int] = []
        # etcd looks at the size of its file, which grows when it commits in batches of its own, every 100 ms.
        while error is None and len(applied) < 400:
            try:
                applied.append(await apply(storage, Put(f"/k/{len(applied):03d}", b"x" * 500_000)))
            except HypervisorError as exc:
                error = exc
        items = (await storage.list("/k/")).items
        await storage.aclose()

    assert isinstance(error, ResourceExhausted)
    assert error.reason == "STORE_DISK_FULL"
    assert [i.mod_revision for i in items] == applied
