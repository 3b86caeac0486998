"""What is taken away of a virtual machine that libvirt has forgotten, and what is not."""

from pathlib import Path

import pytest

from hypervisor.agent.drivers.libvirt.remains import sweep_remains

OURS = "i-01m8cbek0000000000000000ab"
OTHER = "i-01m8cbek0000000000000000zz"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    directory = tmp_path / "logs"
    directory.mkdir()
    return directory


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    directory = tmp_path / "cgroup"
    directory.mkdir()
    return directory


def test_logs_of_the_instance_go_and_those_of_others_stay(logs: Path, cgroups: Path) -> None:
    ours = [f"{OURS}.log", f"{OURS}.log.0", f"{OURS}.log.12"]
    others = [f"{OTHER}.log", f"{OURS}.log.gz", f"{OURS}.log.", f"{OURS}x.log", f"a{OURS}.log"]
    for name in (*ours, *others):
        (logs / name).write_text("said")

    assert sweep_remains(OURS, logs=logs, cgroups=cgroups) == []

    assert {path.name for path in logs.iterdir()} == set(others)


@pytest.mark.parametrize("version", [1, 2])
def test_groups_of_the_instance_go_from_every_hierarchy(logs: Path, cgroups: Path, version: int) -> None:
    tops = [cgroups] if version == 2 else [cgroups / "cpu,cpuacct", cgroups / "memory", cgroups / "unified"]
    for top in tops:
        for name in (
            f"qemu-3-{OURS}",
            f"qemu-12-{OURS}",
            f"qemu-4-{OTHER}",
            f"lxc-3-{OURS}",
            f"qemu-x-{OURS}",
        ):
            (top / "machine" / f"{name}.libvirt-qemu" / "vcpu0").mkdir(parents=True)
    if version == 2:
        (cgroups / "cgroup.controllers").write_text("cpu memory\n")
    else:
        (cgroups / "cpu").symlink_to("cpu,cpuacct")

    assert sweep_remains(OURS, logs=logs, cgroups=cgroups) == []

    for top in tops:
        assert {path.name for path in (top / "machine").iterdir()} == {
            f"qemu-4-{OTHER}.libvirt-qemu",
            f"lxc-3-{OURS}.libvirt-qemu",
            f"qemu-x-{OURS}.libvirt-qemu",
        }


def test_links_are_not_followed(logs: Path, cgroups: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "inner").mkdir(parents=True)
    (precious / "file").write_text("kept")
    (logs / f"{OURS}.log").symlink_to(precious / "file")
    machine = cgroups / "memory" / "machine"
    machine.mkdir(parents=True)
    (machine / f"qemu-1-{OURS}.libvirt-qemu").symlink_to(precious)

    assert sweep_remains(OURS, logs=logs, cgroups=cgroups) == []

    assert (precious / "file").read_text() == "kept"
    assert (precious / "inner").is_dir()
    assert list(logs.iterdir()) == []


def test_what_cannot_be_removed_is_told(logs: Path, cgroups: Path) -> None:
    (logs / f"{OURS}.log").mkdir()
    group = cgroups / "memory" / "machine" / f"qemu-1-{OURS}.libvirt-qemu"
    group.mkdir(parents=True)
    (group / "tasks").write_text("1")

    left = sweep_remains(OURS, logs=logs, cgroups=cgroups)

    assert len(left) == 2
    assert left[0].startswith(f"{logs / OURS}.log (")
    assert left[1].startswith(f"control group {group} (")


def test_what_is_no_id_or_not_there_leaves_everything_as_it_is(logs: Path, cgroups: Path) -> None:
    (logs / "box.log").write_text("said")

    assert sweep_remains("box", logs=logs, cgroups=cgroups) == []
    assert sweep_remains(OURS, logs=logs / "absent", cgroups=cgroups / "absent") == []

    assert (logs / "box.log").exists()
