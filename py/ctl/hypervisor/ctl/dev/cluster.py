"""``up``, ``down`` and ``status`` of a development cluster."""

import fcntl
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.core.errors import DeadlineExceeded, FailedPrecondition, HypervisorError, Unavailable
from hypervisor.ctl import lazygrpc
from hypervisor.ctl.dev.mounts import mounts_below
from hypervisor.ctl.dev.plan import Layout, Plan
from hypervisor.ctl.dev.processes import terminate
from hypervisor.ctl.dev.state import ClusterState, read_state, write_atomically
from hypervisor.ctl.dev.supervisor import supervise
from hypervisor.ctl.dev.sweep import console_holders_of, programs_of, remove_tree, sweep

if TYPE_CHECKING:
    from hypervisor.ctl.session import Session
    from hypervisor.v1.node_pb2 import Node

__all__ = ["Status", "await_ready", "clear_leftovers", "locked", "purge", "start", "status", "stop"]

Say = Callable[[str], None]
_STOP_S = 60.0
_RESTARTS_THAT_MEAN_TROUBLE = 3
_TAIL_LINES = 15
_RUNTIMES = ("containerd", "libvirtd")


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a cluster: its plan (None: never started here) and the state on record of its processes."""

    plan: Plan | None
    state: ClusterState | None

    @property
    def running(self) -> bool:
        """Whether its supervisor is alive."""
        return self.state is not None and self.state.supervisor.alive()


def status(root: Path) -> Status:
    """Read the records below a directory."""
    layout = Layout(root)
    try:
        plan: Plan | None = Plan.from_json(layout.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        plan = None
    return Status(plan, read_state(layout.state))


def locked(root: Path) -> int:
    """Take the directory for one cluster; the descriptor holds it until it is closed in every process that has it.

    FailedPrecondition (DEV_CLUSTER_EXISTS) where a cluster runs or is being started.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(Layout(root).lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FailedPrecondition(
            f"a development cluster runs already, or is being started, in {root}: see 'hypervisor-ctl dev status', end "
            "it with 'hypervisor-ctl dev down', or give another --dir",
            reason="DEV_CLUSTER_EXISTS",
            metadata={"dir": str(root)},
        ) from None
    return descriptor


def start(plan: Plan, lock: int) -> None:
    """Write the configuration and start the supervisor in the background. ``lock`` goes over to it."""
    layout = plan.layout
    for directory in (layout.images, layout.config("server").parent, layout.log("server").parent):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for program in ("server", "agent", *(("containerd",) if plan.private_containerd else ())):
        layout.data(program).mkdir(parents=True, exist_ok=True, mode=0o700)
    import yaml

    write_atomically(layout.config("server"), yaml.safe_dump(plan.server_config(), sort_keys=False))
    write_atomically(layout.config("agent"), yaml.safe_dump(plan.agent_config(), sort_keys=False))
    if plan.private_containerd:
        write_atomically(layout.config("containerd"), plan.containerd_config())
    if not plan.simulated:
        plan.run.mkdir(exist_ok=True, mode=0o700)
    if plan.private_libvirt:
        for directory in plan.libvirtd.directories():
            directory.mkdir(parents=True, exist_ok=True, mode=0o711)
        for path, text in plan.libvirtd.files().items():
            write_atomically(path, text)
    write_atomically(layout.plan, plan.to_json())
    _fork_supervisor(plan)
    os.close(lock)


def _fork_supervisor(plan: Plan) -> None:
    """A child that outlives us. Only before gRPC is used in this process: its threads do not survive a fork."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    # From here on nothing may return into the caller's code.
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        lazygrpc.hear_core_again()
        log = os.open(plan.layout.log("supervisor"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        supervise(plan.processes(), plan.layout.state)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def await_ready(plan: Plan, timeout_s: float) -> "list[Node]":
    """Wait until every node is READY and has a driver that works.

    Unavailable (DEV_CLUSTER_FAILED) with the end of the log where a process keeps dying; DeadlineExceeded else.
    """
    from hypervisor.ctl.session import Deadline, Session
    from hypervisor.ctl.settings import Connection

    deadline = Deadline(timeout_s)
    last = "nothing was heard yet"
    with Session(Connection(plan.server_address, tls=None, token=None, context=None)) as session:
        while deadline.allows(0):
            _raise_if_failing(plan)
            try:
                nodes = _nodes(session)
            except HypervisorError as exc:
                last = str(exc)
            else:
                ready = [node for node in nodes if _is_ready(node)]
                if len(ready) >= plan.nodes:
                    return ready
                last = f"{len(ready)} of {plan.nodes} nodes are ready{_why_not(nodes)}"
            time.sleep(0.1)
    raise DeadlineExceeded(
        f"the cluster was not ready within {timeout_s:g} s: {last}. Logs: {plan.layout.log('agent').parent}",
        reason="DEV_CLUSTER_NOT_READY",
        metadata={"logs": str(plan.layout.log("agent").parent)},
    )


def _nodes(session: "Session") -> "list[Node]":
    from hypervisor.ctl.paging import list_all
    from hypervisor.ctl.session import Deadline
    from hypervisor.v1.cluster_pb2 import ListNodesRequest

    request = ListNodesRequest()
    return list_all(
        session, session.cluster.ListNodes, request, lambda page: page.nodes, deadline=Deadline(5.0)
    )


def _is_ready(node: "Node") -> bool:
    from hypervisor.v1.node_pb2 import NODE_STATUS_READY

    return node.status == NODE_STATUS_READY and any(driver.available for driver in node.drivers)


def _why_not(nodes: "list[Node]") -> str:
    reasons = sorted({d.reason for node in nodes for d in node.drivers if not d.available and d.reason})
    return f" ({'; '.join(reasons)})" if reasons else ""


def _raise_if_failing(plan: Plan) -> None:
    state = read_state(plan.layout.state)
    if state is None:
        return  # the supervisor has not begun
    for process in state.processes:
        if process.restarts >= _RESTARTS_THAT_MEAN_TROUBLE:
            log = plan.layout.log(process.name)
            raise Unavailable(
                f"{'' if process.name in _RUNTIMES else 'hypervisor-'}{process.name} does not start "
                f"({process.last_exit}); the end of {log}:\n{_tail(log)}",
                reason="DEV_CLUSTER_FAILED",
                metadata={"process": process.name, "log": str(log)},
            )


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return "  (it is empty)"
    return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])


def stop(root: Path, *, say: Say) -> None:
    """End the supervisor and all it runs, then what an earlier crash left; nothing to do is no error."""
    known = status(root)
    state = known.state
    if state is not None:
        stubborn = terminate([state.supervisor], grace_s=_STOP_S)
        # A killed supervisor leaves its processes behind; they are on record.
        stubborn += terminate(state.running(), grace_s=10.0)
        if stubborn:
            raise FailedPrecondition(
                f"these processes do not end: {', '.join(str(p.pid) for p in stubborn)}",
                reason="DEV_CLUSTER_STUCK",
            )
        Layout(root).state.unlink(missing_ok=True)
        say("Stopped.")
    # What was started and is on no record would go on making sockets and files.
    stubborn = [] if known.plan is None else terminate(programs_of(known.plan), grace_s=10.0)
    if stubborn:
        raise FailedPrecondition(
            f"a program of the cluster does not end: process {stubborn[0].pid}", reason="DEV_CLUSTER_STUCK"
        )
    # It outlives agents on purpose, and its guests end with the cluster.
    stubborn = terminate(console_holders_of(Layout(root).console_holder_socket), grace_s=5.0)
    if stubborn:
        raise FailedPrecondition(
            f"the console holder does not end: process {stubborn[0].pid}", reason="DEV_CLUSTER_STUCK"
        )


def clear_leftovers(plan: Plan, *, say: Say) -> None:
    """Remove shims, VMMs, mounts, cgroups and sockets of a stopped cluster."""
    left = sweep(plan)
    if left:
        say(f"Warning: could not be removed: {', '.join(left)}")


def purge(root: Path) -> None:
    """Delete the directories of a stopped cluster. Refuses directories that are none, and such with mounts.

    FailedPrecondition (NOT_PURGED) names what could not be deleted; the plan then stays, so that it can be repeated.
    """
    layout = Layout(root)
    if not layout.plan.is_file():
        raise FailedPrecondition(
            f"{root} does not look like a development cluster (it has no plan.json): nothing was deleted",
            reason="NOT_A_DEV_CLUSTER",
            metadata={"dir": str(root)},
        )
    mounts = mounts_below(root)
    if mounts:
        raise FailedPrecondition(
            f"{mounts[0]} is still mounted: nothing was deleted",
            reason="STILL_MOUNTED",
            metadata={"dir": str(root)},
        )
    plan = status(root).plan
    # Also where the nodes are simulated now: they may have been real the last time.
    left = [] if plan is None else remove_tree(plan.run)
    if not left:
        for entry in sorted(root.iterdir()):
            if entry != layout.plan:
                left += remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else _removed(entry)
    if not left:
        left = _removed(layout.plan) + remove_tree(root)
    if left:
        raise FailedPrecondition(
            f"{left[0]} could not be deleted{f', and {len(left) - 1} more' if left[1:] else ''}: see what uses it, "
            "then repeat 'hypervisor-ctl dev down --purge'",
            reason="NOT_PURGED",
            metadata={"dir": str(root)},
        )


def _removed(path: Path) -> list[str]:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        return [f"{path} ({exc.strerror})"]
    return []
