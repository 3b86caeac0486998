"""The built release, a cluster of its programs, an image of Debian's busybox; and the bare driver on a containerd."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hvtest_containerd import PrivateContainerd, missing_programs
from hvtest_containers import ContainerdBench
from hvtest_programs import ProgramCluster, unpack_release
from hypervisor.agent.drivers.containerd import ContainerdDriver


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked release tarball."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: tools/setup installs what is missing, as root")
    return unpack_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def cluster(release: Path) -> Iterator[ProgramCluster]:
    """One server, one agent, one containerd, shared by the tests of a module."""
    with ProgramCluster(release) as running:
        yield running


@pytest.fixture(scope="module")
def image(cluster: ProgramCluster) -> str:
    """Reference of a busybox image on the node, made by the command line from Debian's busybox-static."""
    return f"oci-archive:{cluster.make_image()}"


@pytest.fixture(autouse=True)
def _leave_nothing_to_the_next_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed half-way shall not fail those after it."""
    yield
    if "cluster" not in request.fixturenames:
        return
    cluster = request.getfixturevalue("cluster")
    if cluster.server.running and cluster.agent.running:
        left = cluster.ctl("instance", "list", "-q").out.split()
        if left:
            cluster.ctl("instance", "delete", *left, "--force")


@pytest.fixture(scope="module")
def containerd() -> Iterator[PrivateContainerd]:
    # Short: shims have sockets below it, whose paths have at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    with PrivateContainerd(directory, namespace=f"test-{directory.name}") as private:
        yield private


@pytest.fixture(scope="module")
def bench(containerd: PrivateContainerd) -> ContainerdBench:
    return ContainerdBench(containerd)


@pytest.fixture
async def driver(bench: ContainerdBench) -> AsyncIterator[ContainerdDriver]:
    driver = await bench.open()
    yield driver
    await driver.aclose()
    cleaner = await bench.open()
    for observation in await cleaner.list():
        await cleaner.delete(observation.instance_id)
    await cleaner.aclose()
    assert bench.leftovers() == {}
