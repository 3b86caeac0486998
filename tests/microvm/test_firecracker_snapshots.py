"""Snapshots, full and incremental, and suspended memory of the real Firecracker: memory and disk go back together."""

import asyncio
import errno
from pathlib import Path

import pytest

from hvtest_microvms import FirecrackerBench, answer, pid_of, root_of, started
from hypervisor.agent.drivers.microvm import MicrovmDriver
from hypervisor.agent.drivers.microvm import snapshots as snapshots_module
from hypervisor.core.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from hypervisor.core.machines import SnapshotKind
from hypervisor.core.states import InstanceStatus

FULL, DIFF = SnapshotKind.FULL, SnapshotKind.DIFF


def directory_of(node: FirecrackerBench, instance_id: str, name: str) -> Path:
    return node.config.data_dir / "instances" / instance_id / "snapshots" / name


async def test_memory_and_disk_go_back_together(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    instance_id = await started(micro, node.spec(disk_gb=1))
    await answer(micro, instance_id, "m 3", "COUNT 1\r\n")
    await answer(micro, instance_id, "w before", "WRITTEN\r\n")
    await micro.create_snapshot(instance_id, "before", kind=FULL)
    await answer(micro, instance_id, "m 3", "COUNT 2\r\n")
    await answer(micro, instance_id, "w after", "WRITTEN\r\n")

    restored = await micro.restore_snapshot(instance_id, "before")

    assert restored.status is InstanceStatus.RUNNING
    await answer(micro, instance_id, "c", "COUNT 1\r\n")
    await answer(micro, instance_id, "r", "DISK before\r\n")
    # What it does from now on is its own: the snapshot can be gone back to again.
    await answer(micro, instance_id, "w again", "WRITTEN\r\n")
    await answer(micro, instance_id, "m 3", "COUNT 2\r\n")
    await micro.restore_snapshot(instance_id, "before")
    await answer(micro, instance_id, "c", "COUNT 1\r\n")
    await answer(micro, instance_id, "r", "DISK before\r\n")


async def test_a_chain_of_diffs_is_small_and_each_can_be_gone_back_to(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.spec(memory_mb=128))
    await answer(micro, instance_id, "m 40", "COUNT 1\r\n")
    full = await micro.create_snapshot(instance_id, "one", kind=FULL)
    await answer(micro, instance_id, "m 2", "COUNT 2\r\n")
    second = await micro.create_snapshot(instance_id, "two", kind=DIFF)
    await answer(micro, instance_id, "m 2", "COUNT 3\r\n")
    third = await micro.create_snapshot(instance_id, "three", kind=DIFF)
    await answer(micro, instance_id, "m 40", "COUNT 4\r\n")

    assert (full.parent, second.parent, third.parent) == ("", "one", "two")
    assert full.size_bytes is not None
    assert full.size_bytes >= 40 << 20
    for diff in (second, third):
        assert diff.size_bytes is not None
        assert 2 << 20 <= diff.size_bytes < 6 << 20
    for name, count in (("two", 2), ("one", 1), ("three", 3), ("two", 2)):
        await micro.restore_snapshot(instance_id, name)
        await answer(micro, instance_id, "c", f"COUNT {count}\r\n")
    (current,) = (kept.name for kept in await micro.list_snapshots(instance_id) if kept.current)
    assert current == "two"


async def test_a_diff_after_going_back_is_based_on_what_was_gone_back_to(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    await micro.create_snapshot(instance_id, "base", kind=FULL)
    await answer(micro, instance_id, "m", "COUNT 2\r\n")
    await micro.create_snapshot(instance_id, "left", kind=DIFF)
    await micro.restore_snapshot(instance_id, "base")
    for count in (2, 3):
        await answer(micro, instance_id, "m 8", f"COUNT {count}\r\n")

    right = await micro.create_snapshot(instance_id, "right", kind=DIFF)
    await micro.restore_snapshot(instance_id, "left")
    await answer(micro, instance_id, "c", "COUNT 2\r\n")
    await micro.restore_snapshot(instance_id, "right")

    assert right.parent == "base"
    await answer(micro, instance_id, "c", "COUNT 3\r\n")


async def test_a_base_in_use_is_kept_until_its_diffs_are_gone(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await micro.create_snapshot(instance_id, "base", kind=FULL)
    await micro.create_snapshot(instance_id, "diff", kind=DIFF)

    with pytest.raises(FailedPrecondition) as caught:
        await micro.delete_snapshot(instance_id, "base")

    assert (caught.value.reason, caught.value.metadata["used_by"]) == ("SNAPSHOT_IN_USE", "diff")
    assert await micro.delete_snapshot(instance_id, "diff")
    assert await micro.delete_snapshot(instance_id, "base")
    assert not directory_of(node, instance_id, "base").exists()


async def test_a_diff_without_a_base_in_this_run_is_refused(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())

    with pytest.raises(FailedPrecondition) as caught:
        await micro.create_snapshot(instance_id, "diff", kind=DIFF)
    assert caught.value.reason == "SNAPSHOT_NO_BASE"

    await micro.create_snapshot(instance_id, "base", kind=FULL)
    await micro.restart(instance_id, grace_s=0.0)
    with pytest.raises(FailedPrecondition) as caught:
        await micro.create_snapshot(instance_id, "diff", kind=DIFF)
    assert caught.value.reason == "SNAPSHOT_NO_BASE"


async def test_the_base_is_known_to_the_next_agent(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    instance_id = await started(micro, node.shell())
    await micro.create_snapshot(instance_id, "base", kind=FULL)
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    await micro.aclose()

    other = node.driver()
    await other.recover(instance_id, {})
    diff = await other.create_snapshot(instance_id, "diff", kind=DIFF)
    await other.stop(instance_id, grace_s=0.0)
    await other.restore_snapshot(instance_id, "diff")

    assert diff.parent == "base"
    await answer(other, instance_id, "c", "COUNT 1\r\n")
    await other.delete(instance_id)
    await other.aclose()


async def test_a_snapshot_of_a_paused_guest_is_paused_when_gone_back_to(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    await micro.pause(instance_id)
    await micro.create_snapshot(instance_id, "still", kind=FULL)
    shown = await micro.get(instance_id)
    await micro.resume(instance_id)

    restored = await micro.restore_snapshot(instance_id, "still")

    assert (shown.status, restored.status) == (InstanceStatus.PAUSED, InstanceStatus.PAUSED)
    await micro.resume(instance_id)
    await answer(micro, instance_id, "c", "COUNT 1\r\n")


async def test_a_snapshot_of_a_stopped_instance_is_its_disk(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.spec(disk_gb=1))
    await answer(micro, instance_id, "w cold", "WRITTEN\r\n")
    await micro.stop(instance_id, grace_s=0.0)
    kept = await micro.create_snapshot(instance_id, "cold", kind=FULL)
    await micro.start(instance_id)
    await answer(micro, instance_id, "w warm", "WRITTEN\r\n")

    restored = await micro.restore_snapshot(instance_id, "cold")

    assert not kept.memory
    assert restored.status is InstanceStatus.STOPPED
    await micro.start(instance_id)
    await answer(micro, instance_id, "r", "DISK cold\r\n")


async def test_suspended_memory_goes_on_once_and_a_restart_drops_it(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.spec(disk_gb=1))
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    await micro.suspend(instance_id)
    directory = node.config.data_dir / "instances" / instance_id / "suspended"
    assert directory.is_dir()
    assert "processes" not in node.leftovers()

    await micro.start(instance_id)
    await answer(micro, instance_id, "c", "COUNT 1\r\n")
    assert not directory.exists()
    await micro.suspend(instance_id)
    await micro.restart(instance_id, grace_s=0.0)

    await answer(micro, instance_id, "c", "COUNT 0\r\n")
    assert not directory.exists()


async def test_suspended_memory_is_found_by_the_next_agent(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await answer(micro, instance_id, "m", "COUNT 1\r\n")
    await micro.suspend(instance_id)
    await micro.aclose()

    other = node.driver()
    seen = await other.recover(instance_id, {})
    assert seen is not None
    assert (seen.status, seen.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
    await other.start(instance_id)
    await answer(other, instance_id, "c", "COUNT 1\r\n")
    await other.delete(instance_id)
    await other.aclose()


async def test_memory_that_cannot_be_loaded_leaves_the_instance_suspended(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())
    await micro.suspend(instance_id)
    state = node.config.data_dir / "instances" / instance_id / "suspended" / "vm"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(FailedPrecondition) as caught:
        await micro.start(instance_id)
    seen = await micro.get(instance_id)
    state.write_bytes(whole)
    again = await micro.start(instance_id)

    assert "snapshot/load" in caught.value.message
    assert (seen.status, seen.reason) == (InstanceStatus.STOPPED, "SUSPENDED")
    assert again.status is InstanceStatus.RUNNING


async def test_a_snapshot_that_does_not_fit_leaves_nothing_and_the_guest_runs_on(
    node: FirecrackerBench, micro: MicrovmDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance_id = await started(micro, node.spec(disk_gb=1))
    await micro.create_snapshot(instance_id, "base", kind=FULL)

    def full(source: Path, target: Path, uid: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(snapshots_module, "_copy", full)
    with pytest.raises(ResourceExhausted) as caught:
        await micro.create_snapshot(instance_id, "large", kind=FULL)
    monkeypatch.undo()

    assert caught.value.reason == "DISK_FULL"
    assert not directory_of(node, instance_id, "large").exists()
    assert not (root_of(node, instance_id) / "saving").exists()
    assert [kept.name for kept in await micro.list_snapshots(instance_id)] == ["base"]
    await answer(micro, instance_id, "echo on", "on\r\non\r\n")
    # The VMM has forgotten what changed since the base.
    with pytest.raises(FailedPrecondition):
        await micro.create_snapshot(instance_id, "diff", kind=DIFF)


async def test_a_snapshot_needs_a_legal_name_and_a_known_one(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    instance_id = await started(micro, node.shell())

    for name in ("", "../up", "a/b", "A", "x" * 64, "a\0", "."):
        with pytest.raises(InvalidArgument):
            await micro.create_snapshot(instance_id, name, kind=FULL)
        with pytest.raises(NotFound):
            await micro.restore_snapshot(instance_id, name)
        assert not await micro.delete_snapshot(instance_id, name)


async def test_snapshots_can_be_taken_while_others_are(node: FirecrackerBench, micro: MicrovmDriver) -> None:
    ids = [await started(micro, node.shell()) for _ in range(4)]

    async with asyncio.TaskGroup() as group:
        for instance_id in ids:
            group.create_task(micro.create_snapshot(instance_id, "at-once", kind=FULL))
            group.create_task(micro.suspend(instance_id))

    assert {seen.reason for seen in await micro.list()} == {"SUSPENDED"}


async def test_a_link_in_the_place_of_the_disk_is_not_followed(
    node: FirecrackerBench, micro: MicrovmDriver
) -> None:
    """A VMM that its guest has taken over owns its root."""
    instance_id = await started(micro, node.spec(disk_gb=1))
    disk = root_of(node, instance_id) / "disk.raw"
    disk.rename(disk.with_name("away"))
    disk.symlink_to("/etc/shadow")

    with pytest.raises(FailedPrecondition):
        await micro.create_snapshot(instance_id, "stolen", kind=FULL)

    assert not directory_of(node, instance_id, "stolen").exists()
    assert pid_of(node, instance_id)
