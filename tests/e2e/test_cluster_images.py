"""Images through the whole platform: imported by the command line, fetched by the node, run by containerd."""

from pathlib import Path

import pytest

from hvtest_images import oci_archive
from hvtest_programs import ProgramCluster


@pytest.fixture
def imported(cluster: ProgramCluster) -> dict[str, str]:
    """Busybox as an image of the cluster, gone from where it was made."""
    archive = cluster.make_image()
    found: dict[str, str] = cluster.must(
        "image", "import", str(archive), "--name", "busybox", "-o", "json"
    ).json()
    archive.unlink()
    return found


def test_a_container_runs_from_an_imported_archive(cluster: ProgramCluster, imported: dict[str, str]) -> None:
    assert imported["format"] == "oci"
    cluster.must(
        *("instance", "create", "web", "--type", "container", "--image", "image:busybox"),
        *("--cpu", "0.1", "--memory", "32MiB", "--", "sh", "-c", "echo from an image; sleep 1000"),
    )

    cluster.wait_status("web", "RUNNING")
    refused = cluster.ctl("image", "delete", "busybox")
    again = cluster.must(
        *("instance", "create", "web2", "--type", "container", "--image", "image:busybox"),
        *("--cpu", "0.1", "--memory", "32MiB", "--", "sleep", "1000"),
    )

    assert refused.code == 4
    assert "is used by web" in refused.err
    assert again.code == 0
    assert "from an image" in cluster.must("instance", "logs", "web").out
    cluster.must("instance", "delete", "web", "web2", "--force")
    cluster.must("image", "delete", "busybox")
    cluster.assert_nothing_left()
    assert list((cluster.directory / "agent" / "images" / "instances").glob("*/*")) == []
    assert list((cluster.directory / "images").glob("**/busybox*")) == []


def test_an_archive_that_is_no_image_fails_with_its_reason_and_leaves_nothing(
    cluster: ProgramCluster, tmp_path: Path
) -> None:
    # Legal at a glance, as the server looks at it; the node's driver looks closer.
    path = tmp_path / "empty.tar"
    path.write_bytes(oci_archive())
    cluster.must("image", "import", str(path), "--name", "empty")

    failed = cluster.ctl(
        *("instance", "create", "x", "--type", "container", "--image", "image:empty", "--cpu", "0.1"),
        *("--memory", "32MiB"),
    )

    assert failed.code == 2, failed
    assert "image:empty" in failed.err
    assert "IMAGE_INVALID" in failed.err
    cluster.assert_nothing_left()
    assert list((cluster.directory / "agent" / "images" / "instances").glob("*/*")) == []
    cluster.must("image", "delete", "empty")
