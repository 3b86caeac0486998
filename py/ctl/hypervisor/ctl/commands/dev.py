"""``dev``: up, down, status, image, guest."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import click

from hypervisor.core.errors import FailedPrecondition, HypervisorError, InvalidArgument
from hypervisor.ctl.dev import cluster, context, preflight
from hypervisor.ctl.dev.libvirtd import SYSTEM_LIBVIRT
from hypervisor.ctl.dev.plan import CONTEXT, Layout, Plan, state_directory
from hypervisor.ctl.dev.state import ProcessState
from hypervisor.ctl.display.table import Column, render
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.options import DURATION, formatted
from hypervisor.ctl.output import note, now_s, write
from hypervisor.ctl.quantities import age

__all__ = ["dev"]

_directory = click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the cluster is kept. Default: ~/.local/state/hypervisor/dev (XDG_STATE_HOME).",
)
_port = click.IntRange(0, 65535)


def _root(invocation: Invocation, directory: Path | None) -> Path:
    return (directory or state_directory(invocation.environ)).expanduser().absolute()


@click.group()
def dev() -> None:
    """A whole cluster on this machine: server, agent and, if none run, a containerd and a libvirtd of its own."""


@dev.command("up")
@_directory
@click.option(
    "--simulated", type=click.IntRange(1, 10_000), metavar="N", help="N nodes that only pretend: no root."
)
@click.option(
    "--grpc-port", type=_port, default=50051, show_default=True, help="gRPC API; 0 takes any free port."
)
@click.option("--http-port", type=_port, default=8080, show_default=True, help="HTTP gateway.")
@click.option("--agent-port", type=_port, default=50052, show_default=True, help="The agent.")
@click.option(
    "--containerd",
    metavar="auto|private|SOCKET",
    default="auto",
    help="auto (the default): the machine's containerd if it runs, else a private one.",
)
@click.option(
    "--libvirt",
    metavar="auto|private|none|URI",
    default="auto",
    help="auto (the default): the machine's libvirt if it runs, else a private one where libvirtd is installed.",
)
@click.option("--hostname", metavar="NAME", default="", help="Name of the node. Default: the machine's.")
@click.option(
    "--image-root",
    "image_roots",
    metavar="DIR",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Directory from which oci-archive: images may be imported, besides DIR/images; repeatable.",
)
@click.option(
    "--server-program", metavar="COMMAND", help="In place of hypervisor-server (HYPERVISOR_SERVER_PROGRAM)."
)
@click.option(
    "--agent-program", metavar="COMMAND", help="In place of hypervisor-agent (HYPERVISOR_AGENT_PROGRAM)."
)
@click.option("--timeout", "timeout_s", type=DURATION, metavar="DURATION", default=60.0, help="Default: 60s.")
@pass_invocation
def up(
    invocation: Invocation,
    *,
    directory: Path | None,
    simulated: int | None,
    grpc_port: int,
    http_port: int,
    agent_port: int,
    containerd: str,
    libvirt: str,
    hostname: str,
    image_roots: tuple[Path, ...],
    server_program: str | None,
    agent_program: str | None,
    timeout_s: float,
) -> None:
    """Start a cluster in the background, wait until it is ready, and use it from now on (context 'dev').

    What dies is started again; logs are in DIR/log. Containers run in containerd, microVMs in Firecracker or QEMU and
    virtual machines in libvirt, as far as these are installed, and need root; with --simulated nothing is real and
    nobody needs it.
    """
    root = _root(invocation, directory)
    environ = invocation.environ
    server = preflight.find_program("server", server_program, environ)
    agent = preflight.find_program("agent", agent_program, environ)
    lock = cluster.locked(root)
    before = cluster.status(root)
    if before.plan is not None:
        # The lock is ours, so whatever still runs is the remains of a supervisor that was killed.
        cluster.stop(root, say=note)
    ports: list[int] = []
    for option, wanted in (
        ("--grpc-port", grpc_port),
        ("--http-port", http_port),
        ("--agent-port", agent_port),
    ):
        ports.append(preflight.free_port(option, wanted, ports))
    runtime, private, snapshotter = (
        _runtime(invocation, root, containerd) if not simulated else ("", False, "")
    )
    uri, private_libvirt = _libvirt(invocation, libvirt) if not simulated else ("", False)
    plan = Plan(
        root=root,
        grpc_port=ports[0],
        http_port=ports[1],
        agent_port=ports[2],
        server_program=server,
        agent_program=agent,
        simulated=simulated or 0,
        containerd=runtime,
        private_containerd=private,
        snapshotter=snapshotter or "overlayfs",
        types=_types(invocation, vms=bool(uri or private_libvirt)),
        libvirt_uri=uri,
        private_libvirt=private_libvirt,
        hostname=hostname or socket.gethostname(),
        image_roots=tuple(path.absolute() for path in image_roots),
        previous_context=context.previous_context(environ),
    )
    if private_libvirt:
        plan = replace(plan, libvirt_uri=plan.libvirtd.uri)
    cluster.start(plan, lock)
    note(f"Starting {'a simulated cluster' if simulated else 'a cluster'} in {root} ...")
    try:
        nodes = cluster.await_ready(plan, timeout_s)
    except BaseException:
        note("It did not start: stopping it again.")
        cluster.stop(root, say=note)
        raise
    context.use_context(environ, plan)
    kind = f"{len(nodes)} simulated nodes" if simulated else f"node {nodes[0].hostname}"
    note(f"Ready: {kind}; 'hypervisor-ctl' now talks to it (context {CONTEXT}).")
    write(f"gRPC     {plan.server_address}\nHTTP     http://{plan.http_address}\nlogs     {root / 'log'}")
    _suggest(plan)


def _runtime(invocation: Invocation, root: Path, wanted: str) -> tuple[str, bool, str]:
    """Which containerd: its socket, whether it is ours to run, and the snapshotter to use."""
    preflight.require_root()
    socket_given = wanted not in ("auto", "private")
    if socket_given:
        path = Path(wanted).absolute()
        if not preflight.answers(path):
            raise FailedPrecondition(
                f"no containerd answers on {path}: start it, or use --containerd private",
                reason="CONTAINERD_UNREACHABLE",
                metadata={"address": str(path)},
            )
        return str(path), False, "overlayfs"
    if wanted == "auto" and preflight.answers(preflight.SYSTEM_CONTAINERD):
        return str(preflight.SYSTEM_CONTAINERD), False, "overlayfs"
    preflight.require_runtime(invocation.environ, ("containerd", "containerd-shim-runc-v2", "runc"))
    path = Layout(root).containerd_socket
    preflight.require_short_socket(path)
    return str(path), True, preflight.chosen_snapshotter(root)


def _libvirt(invocation: Invocation, wanted: str) -> tuple[str, bool]:
    """Which libvirt: its URI (empty: none, or the private one's, which the plan knows), and whether to run one."""
    match wanted:
        case "none":
            return "", False
        case "private":
            preflight.require_libvirtd(invocation.environ)
            return "", True
        case "auto":
            if preflight.answers(SYSTEM_LIBVIRT):
                return "qemu:///system", False
            return "", preflight.has_libvirtd(invocation.environ)
    return wanted, False


def _types(invocation: Invocation, *, vms: bool) -> tuple[str, ...]:
    """What the node can be expected to run. A driver that then cannot work says why in ``node get``."""
    microvms = preflight.has_vmm(invocation.environ)
    return ("container", *(("microvm",) if microvms else ()), *(("vm",) if vms else ()))


def _suggest(plan: Plan) -> None:
    if plan.simulated:
        note(
            "Next:  hypervisor-ctl node list\n       hypervisor-ctl instance create web --image any --memory 256MiB"
        )
        return
    note(
        "Next:  hypervisor-ctl dev image --binary /bin/busybox    (Debian: apt-get install busybox-static)\n"
        f"       hypervisor-ctl instance create web --image oci-archive:{plan.layout.images}/busybox.tar -- "
        "sh -c 'while date; do sleep 1; done'\n"
        "       hypervisor-ctl instance console web"
    )


@dev.command("down")
@_directory
@click.option(
    "--keep", is_flag=True, help="Leave the instances running; the next 'dev up' takes them on again."
)
@click.option("--purge", is_flag=True, help="Delete all its data as well.")
@pass_invocation
def down(invocation: Invocation, *, directory: Path | None, keep: bool, purge: bool) -> None:
    """Stop the cluster: delete its instances, then end its processes. Data and images stay, unless --purge."""
    if keep and purge:
        raise click.UsageError("--keep and --purge exclude each other")
    root = _root(invocation, directory)
    known = cluster.status(root)
    if known.plan is None:
        if purge and root.exists():
            cluster.purge(root)
        note(f"No development cluster in {root}.")
        return
    plan = known.plan
    if known.running and not keep:
        _delete_instances(plan)
    cluster.stop(root, say=note)
    if not keep:
        cluster.clear_leftovers(plan, say=note)
    context.forget_context(invocation.environ, plan)
    if purge:
        cluster.purge(root)
        note(f"Deleted {root}.")


def _delete_instances(plan: Plan) -> None:
    from hypervisor.ctl.dev.removal import delete_all_instances

    try:
        count, failures = delete_all_instances(plan)
    except HypervisorError as exc:
        note(f"Warning: the instances could not be deleted one by one ({exc}).")
        return
    if count:
        note(f"Deleted {count} instance{'s' if count != 1 else ''}.")
    for failure in failures:
        note(f"Warning: {failure}")


@dev.command("status")
@_directory
@formatted
@pass_invocation
def status(invocation: Invocation, *, directory: Path | None) -> None:
    """Show what runs. Exit code 3 when no cluster does."""
    root = _root(invocation, directory)
    known = cluster.status(root)
    processes = known.state.processes if known.running and known.state is not None else ()
    if invocation.output in ("json", "yaml"):
        _write_status(invocation, root, known)
    elif invocation.quiet:
        write("running" if known.running else "stopped")
    elif not known.running or known.plan is None:
        note(f"No development cluster runs in {root}. Start one with 'hypervisor-ctl dev up'.")
    else:
        moment = now_s()
        columns: list[Column[ProcessState]] = [
            Column("PROCESS", lambda p: p.name),
            Column(
                "STATE",
                lambda p: "running" if p.process is not None and p.process.alive() else "starting again",
            ),
            Column("PID", lambda p: str(p.process.pid) if p.process is not None else "", right=True),
            Column("UP", lambda p: age(moment - p.since_s) if p.since_s else "", right=True),
            Column("RESTARTS", lambda p: str(p.restarts), right=True),
            Column("LAST EXIT", lambda p: p.last_exit),
        ]
        write("\n".join(render(columns, processes, headers=invocation.headers)))
        plan = known.plan
        note(
            f"gRPC {plan.server_address}, HTTP http://{plan.http_address}, logs {plan.layout.log('server').parent}"
        )
    if not known.running:
        raise click.exceptions.Exit(3)


def _write_status(invocation: Invocation, root: Path, known: cluster.Status) -> None:
    document: dict[str, object] = {"dir": str(root), "running": known.running}
    if known.running and known.plan is not None and known.state is not None:
        document |= {
            "grpc_address": known.plan.server_address,
            "http_address": known.plan.http_address,
            "simulated": known.plan.simulated,
            "containerd": known.plan.containerd,
            "processes": [
                {
                    "name": p.name,
                    "pid": p.process.pid if p.process is not None else None,
                    "restarts": p.restarts,
                    "last_exit": p.last_exit,
                }
                for p in known.state.processes
            ],
        }
    if invocation.output == "json":
        write(json.dumps(document, indent=2))
        return
    import yaml

    write(yaml.safe_dump(document, sort_keys=False).rstrip("\n"))


@dev.command("image")
@click.option(
    "--binary",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A static program, such as /bin/busybox of Debian's busybox-static.",
)
@click.option("-o", "--output", "output", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--name", metavar="NAME:TAG", help="Name of the image. Default: the program's name and 'latest'."
)
@click.option(
    "--env", "-e", metavar="KEY=VALUE", multiple=True, help="Environment variable of the image; repeatable."
)
@_directory
@click.argument("command", metavar="[-- COMMAND ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
@pass_invocation
def image(
    invocation: Invocation,
    *,
    binary: Path,
    output: Path | None,
    name: str | None,
    env: tuple[str, ...],
    directory: Path | None,
    command: tuple[str, ...],
) -> None:
    """Pack a static program into an OCI image archive, without any image tool or registry.

    Without -o it goes where the development cluster may import it from. Prints how 'instance create --image' names it.
    What follows '--' is the program that containers of the image run; default: sh.
    """
    from hypervisor.ctl.oci_image import build_archive

    variables = {}
    for text in env:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidArgument.of_field("--env", f"{text!r}: write KEY=VALUE")
        variables[key] = value
    out = output or Layout(_root(invocation, directory)).images / f"{binary.name}.tar"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        digest = build_archive(
            binary, out, name=name or f"{binary.name}:latest", command=command or ("sh",), env=variables
        )
    except OSError as exc:
        raise InvalidArgument.of_field(
            "--output", f"{os.fspath(out)} cannot be written: {exc.strerror}"
        ) from exc
    note(f"Image {digest}")
    write(f"oci-archive:{out.absolute()}")


_file = click.Path(path_type=Path, dir_okay=False, exists=True)


@dev.command("guest")
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), help="Where it is written."
)
@click.option(
    "--kernel",
    metavar="FILE",
    type=_file,
    help="Default: the newest /boot/vmlinuz-*, one of a cloud kernel first.",
)
@click.option(
    "--modules",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The kernel's modules. Default: /lib/modules/ and the kernel's release.",
)
@click.option("--busybox", metavar="FILE", type=_file, help="A static busybox. Default: /bin/busybox.")
@click.option(
    "--vmlinux", is_flag=True, help="Also write the kernel unpacked (ELF), as Firecracker boots it."
)
@_directory
@pass_invocation
def guest(
    invocation: Invocation,
    *,
    out: Path | None,
    kernel: Path | None,
    modules: Path | None,
    busybox: Path | None,
    vmlinux: bool,
    directory: Path | None,
) -> None:
    """Make a small Linux guest for virtual machines and microVMs: a kernel and an initial RAM disk with busybox.

    Made of what Debian's linux-image-cloud-amd64 and busybox-static have installed. It needs no disk, prints READY and
    gives a shell on its console. Without --out it goes where the development cluster may boot it from. Prints the paths
    for 'instance create --kernel' and '--initrd'.

    Words for the guest on the kernel's command line: GUEST_RUN="COMMAND" runs that in place of the shell,
    GUEST_IP=10.0.0.2/24 is the address of its network card, GUEST_ON_ERROR=panic makes it panic when the shell or the
    command ends with an error.
    """
    from hypervisor.ctl import guest_image

    kernel = kernel or guest_image.find_kernel()
    if kernel is None:
        raise InvalidArgument.of_field(
            "--kernel", "there is none in /boot: apt-get install linux-image-cloud-amd64, or give one"
        )
    modules = modules or guest_image.modules_of(kernel)
    busybox = busybox or Path("/bin/busybox")
    if not busybox.exists():
        raise InvalidArgument.of_field(
            "--busybox", f"{busybox} does not exist: apt-get install busybox-static, or give one"
        )
    target = out or Layout(_root(invocation, directory)).images / "guest"
    try:
        target.mkdir(parents=True, exist_ok=True)
        made = guest_image.build_guest(
            target.absolute(), kernel=kernel, modules=modules, busybox=busybox, vmlinux=vmlinux
        )
    except OSError as exc:
        where = f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)
        raise FailedPrecondition(
            f"the guest cannot be made of {kernel}, {modules} and {busybox} in {target} ({where})",
            reason="GUEST_NOT_MADE",
            metadata={"kernel": str(kernel), "modules": str(modules), "out": str(target)},
        ) from exc
    write(f"kernel {made.kernel}\ninitrd {made.initrd}")
    if made.vmlinux is not None:
        write(f"vmlinux {made.vmlinux}")
