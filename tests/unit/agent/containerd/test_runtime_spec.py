"""The OCI runtime specification of a container."""

from typing import Any

import pytest

from hypervisor.agent.drivers.containerd.accounts import Account
from hypervisor.agent.drivers.containerd.oci import ProcessConfig
from hypervisor.agent.drivers.containerd.runtime_spec import (
    CAPABILITIES,
    HostFeatures,
    build_runtime_spec,
    merge_environment,
)
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.model import InstanceSpec


def build(
    spec: InstanceSpec | None = None,
    *,
    config: ProcessConfig | None = None,
    account: Account | None = None,
    swap_limit: bool = True,
    architecture: str = "amd64",
) -> dict[str, Any]:
    return build_runtime_spec(
        spec or InstanceSpec(command=("sh",)),
        hostname="box",
        config=config or ProcessConfig(),
        account=account or Account(),
        cgroups_path="/hypervisor/i-1",
        host=HostFeatures(architecture=architecture, swap_limit=swap_limit, open_files=4096),
    )


def test_the_command_of_the_spec_replaces_entry_point_and_command_of_the_image() -> None:
    config = ProcessConfig(entrypoint=("/entry",), cmd=("default",))

    assert build(InstanceSpec(command=("mine", "1")), config=config)["process"]["args"] == ["mine", "1"]
    assert build(InstanceSpec(), config=config)["process"]["args"] == ["/entry", "default"]


def test_a_command_is_required_where_the_image_has_none() -> None:
    with pytest.raises(InvalidArgument) as caught:
        build(InstanceSpec())

    assert caught.value.reason == "COMMAND_REQUIRED"
    assert caught.value.violations[0].field == "spec.command"


@pytest.mark.parametrize(
    "spec",
    [
        InstanceSpec(command=("sh", "a\0b")),
        InstanceSpec(command=("sh",), env={"A": "\0"}),
        InstanceSpec(command=("sh",), env={"": "x"}),
        InstanceSpec(command=("sh",), env={"A=B": "x"}),
        InstanceSpec(command=("sh",), working_dir="relative"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_its_field(spec: InstanceSpec) -> None:
    with pytest.raises(InvalidArgument) as caught:
        build(spec)

    assert caught.value.violations[0].field.startswith("spec.")


def test_the_environment_of_the_spec_wins_over_the_image_and_the_image_over_defaults() -> None:
    merged = merge_environment(["PATH=/image", "A=image", "B=image"], {"B": "spec", "C": "spec"})

    assert merged == ["PATH=/image", "TERM=xterm-256color", "A=image", "B=spec", "C=spec"]


def test_the_processor_quota_is_left_to_the_start() -> None:
    assert build(InstanceSpec(command=("sh",), cpu_millis=250))["linux"]["resources"]["cpu"] == {
        "shares": 256
    }


def test_memory_and_process_limits_are_those_of_the_spec() -> None:
    resources = build(InstanceSpec(command=("sh",), memory_mb=64, pids_limit=20))["linux"]["resources"]

    assert resources["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert resources["pids"] == {"limit": 20}


def test_swap_is_not_limited_where_the_kernel_cannot() -> None:
    assert "swap" not in build(swap_limit=False)["linux"]["resources"]["memory"]


def test_a_container_is_confined() -> None:
    spec = build()

    process = spec["process"]
    assert process["noNewPrivileges"] is True
    assert process["capabilities"]["bounding"] == list(CAPABILITIES)
    assert not {"CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_SYS_MODULE"} & set(CAPABILITIES)
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096}]
    linux = spec["linux"]
    assert {n["type"] for n in linux["namespaces"]} == {"pid", "ipc", "uts", "mount", "network", "cgroup"}
    assert {"allow": False, "access": "rwm"} in linux["resources"]["devices"]
    assert "/proc/kcore" in linux["maskedPaths"]
    assert "/proc/sys" in linux["readonlyPaths"]
    assert linux["cgroupsPath"] == "/hypervisor/i-1"
    sysfs = next(mount for mount in spec["mounts"] if mount["destination"] == "/sys")
    assert "ro" in sysfs["options"]


def test_a_user_other_than_root_holds_no_capabilities() -> None:
    process = build(account=Account(1000, 1000, (4, 20)))["process"]

    assert process["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [4, 20]}
    assert process["capabilities"]["effective"] == []
    assert process["capabilities"]["permitted"] == []


def test_system_calls_outside_of_the_profile_fail() -> None:
    profile = build()["linux"]["seccomp"]
    allowed = {name for rule in profile["syscalls"] for name in rule["names"] if "args" not in rule}

    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {"read", "execve", "openat", "mmap", "futex"} <= allowed
    assert (
        not {
            "bpf",
            "clone",
            "delete_module",
            "init_module",
            "io_uring_setup",
            "kexec_load",
            "keyctl",
            "mount",
            "open_by_handle_at",
            "perf_event_open",
            "pivot_root",
            "reboot",
            "setns",
            "swapon",
            "umount2",
            "unshare",
            "userfaultfd",
        }
        & allowed
    )


def test_new_namespaces_cannot_be_cloned() -> None:
    rules = build()["linux"]["seccomp"]["syscalls"]
    clone = [rule for rule in rules if rule["names"] == ["clone"]]

    assert [rule["args"][0]["op"] for rule in clone] == ["SCMP_CMP_MASKED_EQ"]
    # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: none may be set.
    assert clone[0]["args"][0]["value"] == (
        0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
    )
    clone3 = next(rule for rule in rules if rule["names"] == ["clone3"])
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)


def test_an_architecture_without_a_profile_gets_none() -> None:
    assert "seccomp" not in build(architecture="sparc64")["linux"]
