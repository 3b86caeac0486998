"""``instance create``: from options or from a file."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from hypervisor.core.errors import FieldViolation, InvalidArgument, ResourceExhausted
from hypervisor.ctl import quantities
from hypervisor.ctl.bulk import Task, run_tasks, told
from hypervisor.ctl.display.table import harmless
from hypervisor.ctl.invocation import Invocation, pass_invocation
from hypervisor.ctl.machine_options import MACHINE_OPTIONS, add_machine_options, machine_options
from hypervisor.ctl.manifest_restart import CONDITIONS, condition_of
from hypervisor.ctl.options import NAME, connected, formatted, project_option, waiting
from hypervisor.ctl.terms import affinity_of, spread_of, toleration_of
from hypervisor.v1.compute_pb2 import CreateInstanceRequest
from hypervisor.v1.instance_pb2 import (
    DesiredState,
    Instance,
    InstanceType,
    LabelConstraint,
    OnNodeLoss,
    OnPartition,
    PlacementPolicy,
)

if TYPE_CHECKING:
    from hypervisor.v1.operation_pb2 import Operation

__all__ = ["create", "read_instances"]

T = TypeVar("T")
D = TypeVar("D")
_REFUSED_SHOWN = 20

_DESCRIBING = frozenset(
    {
        "name",
        "command",
        "kind",
        "image",
        "cpu",
        "memory",
        "disk",
        "env",
        "labels",
        "workdir",
        "pids",
        "kernel",
        "initrd",
        "kernel_args",
        "node",
        "selector",
        "placement",
        "tolerate",
        "affinity",
        "anti_affinity",
        "spread",
        "on_node_loss",
        "on_partition",
        "stopped",
        "restart",
        "max_restarts",
    }
    | MACHINE_OPTIONS
)


@click.command("create")
@click.argument("name", required=False)
@click.argument("command", metavar="[-- COMMAND ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-f",
    "--file",
    metavar="FILE",
    help="Describe the instances in YAML, one a document; - is standard input. In place of NAME and what follows.",
)
@click.option("--type", "kind", type=click.Choice(["vm", "container", "microvm"]), help="Default: container.")
@click.option(
    "--image",
    metavar="IMAGE",
    help="What it boots or runs: image:NAME (see 'image list'), a reference the node has, or "
    "oci-archive:/path/on/the/node.tar[#name:tag].",
)
@click.option("--cpu", metavar="CORES", help="Processors, such as 2, 0.5 or 500m. Default: 1.")
@click.option("--memory", metavar="SIZE", help="Memory limit, such as 256MiB (the default) or 2GiB.")
@click.option("--disk", metavar="SIZE", help="Disk, in whole GiB, such as 10GiB. Default: 0.")
@click.option("-e", "--env", metavar="KEY=VALUE", multiple=True, help="Environment variable; repeatable.")
@click.option("-l", "--label", "labels", metavar="KEY=VALUE", multiple=True, help="Label; repeatable.")
@click.option("--workdir", metavar="PATH", default="", help="Working directory of the container.")
@click.option("--pids", metavar="N", type=int, help="Most processes and threads. Default: 4096.")
@click.option("--kernel", metavar="PATH", default="", help="vm, microvm: kernel on the node, or image:NAME.")
@click.option(
    "--initrd", metavar="PATH", default="", help="vm, microvm: initial RAM disk on the node, or image:NAME."
)
@click.option("--kernel-args", metavar="TEXT", default="", help="vm, microvm: kernel command line.")
@machine_options
@click.option(
    "--node", metavar="NODE", type=NAME("node"), default="", help="Only on this node; it still has to fit."
)
@click.option(
    "--selector",
    metavar="CONDITIONS",
    multiple=True,
    help="Only on nodes whose labels match: KEY=VALUE, KEY!=VALUE, 'KEY in (A, B)', 'KEY notin (A, B)', KEY.",
)
@click.option("--placement", type=click.Choice(["spread", "binpack"]), help="How nodes that fit are ranked.")
@click.option(
    "--tolerate",
    metavar="TAINT",
    multiple=True,
    help="Do not mind a taint: KEY, KEY=VALUE, either with :EFFECT; repeatable.",
)
@click.option(
    "--affinity",
    metavar="CONDITIONS[@LABEL]",
    multiple=True,
    help="Only where an instance with these labels is: on the same node, or on one with the same LABEL of nodes, such "
    "as app=db@hypervisor/zone; repeatable.",
)
@click.option(
    "--anti-affinity",
    metavar="CONDITIONS[@LABEL]",
    multiple=True,
    help="Only where no instance with these labels is; repeatable.",
)
@click.option(
    "--spread",
    metavar="CONDITIONS[@LABEL]",
    multiple=True,
    help="Rather where few instances with these labels are: by zone, or by another LABEL of nodes; repeatable.",
)
@click.option(
    "--restart",
    type=click.Choice(CONDITIONS),
    help="Start it again when it ends by itself: after failures only, or always. Default: never.",
)
@click.option(
    "--max-restarts",
    metavar="N",
    type=click.IntRange(1, 1_000_000),
    help="Most restarts in a row. Default: no limit.",
)
@click.option(
    "--on-node-loss",
    type=click.Choice(["never", "reschedule", "restart-in-place"]),
    help="When its node is lost: leave it (never, the default), make it anew on another node, or start it again once "
    "its node is back.",
)
@click.option(
    "--on-partition",
    type=click.Choice(["stay", "stop"]),
    help="When its node hears from no server: run on (the default), or be stopped (always with reschedule).",
)
@click.option("--stopped", is_flag=True, help="Make it and leave it stopped.")
@click.option("--dry-run", is_flag=True, help="Check everything and choose a node, but make nothing.")
@waiting
@project_option
@formatted
@connected
@pass_invocation
def create(
    invocation: Invocation,
    *,
    name: str | None,
    command: Sequence[str],
    file: str | None,
    kind: str | None,
    image: str | None,
    cpu: str | None,
    memory: str | None,
    disk: str | None,
    env: Sequence[str],
    labels: Sequence[str],
    workdir: str,
    pids: int | None,
    kernel: str,
    initrd: str,
    kernel_args: str,
    node: str,
    selector: Sequence[str],
    placement: str | None,
    tolerate: Sequence[str],
    affinity: Sequence[str],
    anti_affinity: Sequence[str],
    spread: Sequence[str],
    restart: str | None,
    max_restarts: int | None,
    on_node_loss: str | None,
    on_partition: str | None,
    stopped: bool,
    dry_run: bool,
    wait: bool,
    project: str,
    **machine: Any,
) -> None:
    """Create an instance from options, or several from a file.

    What follows '--' is the program that a container runs and its arguments.

    \b
    hypervisor-ctl instance create web --image docker.io/library/busybox:1.36 --cpu 0.5 -- httpd -f
    hypervisor-ctl instance create db --type vm --image debian-12 --memory 1GiB --ssh-key ~/.ssh/id_ed25519.pub
    hypervisor-ctl instance create -f instances.yaml
    """
    if file is not None:
        _refuse_description(click.get_current_context())
        instances = read_instances(file, project)
    else:
        if not name:
            raise click.UsageError("give the NAME of the instance, or --file FILE")
        collected = _Problems()
        instance = Instance(
            name=name,
            project=project,
            type=InstanceType.Value(f"INSTANCE_TYPE_{(kind or 'container').upper()}"),
            labels=collected.pairs("labels", labels),
        )
        spec = instance.spec
        spec.image = image or ""
        # An amount that is not given stays absent: the server has the defaults.
        if cpu is not None:
            spec.cpu_cores = collected.take(partial(quantities.cpu_cores, "spec.cpu_cores", cpu), 0.0)
        if memory is not None:
            spec.memory_mb = collected.take(partial(quantities.whole_mib, "spec.memory_mb", memory), 0)
        if disk is not None:
            spec.disk_gb = collected.take(partial(quantities.whole_gib, "spec.disk_gb", disk), 0)
        if pids is not None:
            spec.pids_limit = pids
        spec.env.update(collected.pairs("spec.env", env))
        spec.command.extend(command)
        spec.working_dir, spec.node = workdir, node
        spec.kernel_path, spec.initrd_path, spec.kernel_args = kernel, initrd, kernel_args
        for text in selector:
            spec.node_selector.extend(collected.take(partial(_constraints, text), ()))
        if placement:
            spec.placement_policy = PlacementPolicy.Value(f"PLACEMENT_POLICY_{placement.upper()}")
        spec.tolerations.extend(collected.each(partial(toleration_of, "spec.tolerations"), tolerate))
        spec.affinity.extend(collected.each(partial(affinity_of, "spec.affinity"), affinity))
        spec.anti_affinity.extend(collected.each(partial(affinity_of, "spec.anti_affinity"), anti_affinity))
        spec.spread.extend(collected.each(partial(spread_of, "spec.spread"), spread))
        if on_node_loss:
            spec.availability.on_node_loss = OnNodeLoss.Value(
                f"ON_NODE_LOSS_{on_node_loss.replace('-', '_').upper()}"
            )
        if on_partition:
            spec.availability.on_partition = OnPartition.Value(f"ON_PARTITION_{on_partition.upper()}")
        collected.take(partial(add_machine_options, instance, machine), None)
        if restart is not None:
            spec.restart.condition = condition_of("spec.restart.condition", restart)
        if max_restarts is not None:
            spec.restart.max_restarts = max_restarts
        if stopped:
            instance.desired_state = DesiredState.DESIRED_STATE_STOPPED
        collected.raise_any()
        instances = [instance]
    session = invocation.session()
    tasks = [
        Task(
            instance.name,
            session.compute.CreateInstance,
            CreateInstanceRequest(instance=instance, no_wait=not wait, validate_only=dry_run),
        )
        for instance in instances
    ]
    try:
        run_tasks(invocation, tasks, done="created", tell=_told_plan if dry_run else _told_created)
    except ResourceExhausted as exc:
        if dry_run and exc.reason == "NO_NODE_FITS":
            _show_refusal(invocation, instances[0])
        raise


def _show_refusal(invocation: Invocation, instance: Instance) -> None:
    """Which nodes fail which check and by how much; with --node, what that one says before all."""
    from hypervisor.ctl.commands.instance_explain import show_explanation
    from hypervisor.v1.compute_pb2 import ExplainPlacementRequest

    request = ExplainPlacementRequest(would_be=instance, node=instance.spec.node, max_nodes=_REFUSED_SHOWN)
    show_explanation(invocation, request)


def _refuse_description(ctx: click.Context) -> None:
    """With a file, nothing else may describe the instance."""
    given = [
        param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name
        for param in ctx.command.params
        if param.name in _DESCRIBING and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"--file describes everything: leave out {', '.join(given)}")


class _Problems:
    """Collects wrong options, so that all of them are told at once."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def take(self, parse: Callable[[], T], default: D) -> T | D:
        try:
            return parse()
        except InvalidArgument as exc:
            self._found.extend(exc.violations)
            return default

    def each(self, parse: Callable[[str], T], texts: Sequence[str]) -> list[T]:
        found = (self.take(partial(parse, text), None) for text in texts)
        return [one for one in found if one is not None]

    def pairs(self, field: str, texts: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for text in texts:
            key, equals, value = text.partition("=")
            if not key or not equals:
                self._found.append(FieldViolation(field, f"{text!r}: write KEY=VALUE"))
            elif key in found:
                self._found.append(FieldViolation(f"{field}.{key}", "is given twice: leave one out"))
            found[key] = value
        return found

    def raise_any(self) -> None:
        if self._found:
            raise InvalidArgument.of_fields(tuple(self._found))


def _constraints(text: str) -> tuple[LabelConstraint, ...]:
    from hypervisor.ctl.selectors import add_selector, parse_selector

    scratch = Instance()
    add_selector(scratch, parse_selector("spec.node_selector", text))
    return tuple(scratch.spec.node_selector)


def read_instances(file: str, project: str, *, named: bool = True) -> list[Instance]:
    """The instances that a file (``-``: standard input) describes, in ``project`` unless they say otherwise."""
    from hypervisor.ctl.manifest import parse_manifest

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidArgument.of_field(
            "--file", f"{file} cannot be read: {exc}", reason="MANIFEST_INVALID"
        ) from exc
    instances = parse_manifest(text, "standard input" if file == "-" else file, named=named)
    for instance in instances:
        instance.project = instance.project or project
    return instances


def _told_created(operation: "Operation", done: str) -> str:
    if not operation.done or not operation.HasField("instance"):
        return told(operation, done)
    from hypervisor.ctl.display.cells import instance_status

    made = operation.instance
    return f"{told(operation, done)} ({instance_status(made)}, {made.id})"


def _told_plan(operation: "Operation", done: str) -> str:
    node = operation.instance.node_id
    name = harmless(operation.object_name or operation.instance.name)
    said = f"instance {name} would be created{f' on node {node}' if node else ''} (dry run: nothing was made)"
    if not operation.HasField("explanation"):
        return said
    from hypervisor.ctl.display.placements import judgements_table

    return "\n".join([said, *judgements_table(operation.explanation)])
