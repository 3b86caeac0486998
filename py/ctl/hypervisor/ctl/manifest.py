"""Instances described in YAML (``instance create -f``): several documents, keys as in the API, every mistake named.

::

    name: web
    type: container            # vm, container, microvm
    labels: {app: web}
    desired_state: running     # or stopped
    spec:
      image: oci-archive:/srv/images/busybox.tar
      cpu_cores: 0.5
      memory_mb: 256           # or memory: 256MiB
      disk_gb: 1               # or disk: 1GiB
      command: [sh, -c, "while true; do date; sleep 1; done"]
      env: {GREETING: hello}
      node_selector: zone in (a, b)
      placement_policy: binpack
      tolerations: [gpu, dedicated=web:no_schedule]
      affinity: [app=db@hypervisor/zone]              # required; as a mapping it can be preferred:
      anti_affinity: [{selector: app=web, preferred: true, weight: 50}]
      spread: [app=web@hypervisor/zone]
      restart: on-failure      # never, always; more in :mod:`.manifest_restart`
      move: {strategy: stop, healthy_after: 10s, allow_disk_loss: true}
      availability: {on_node_loss: reschedule, on_partition: stop}

What only machines have is in :mod:`.manifest_machine`.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.names import shorten
from hypervisor.ctl import quantities
from hypervisor.ctl.manifest_machine import MACHINE_KEYS, read_machine
from hypervisor.ctl.manifest_restart import read_restart
from hypervisor.ctl.selectors import Condition, add_selector, parse_selector, selector_of
from hypervisor.ctl.terms import affinity_of, spread_of, toleration_of
from hypervisor.v1.instance_pb2 import (
    AffinityTerm,
    Availability,
    DesiredState,
    Instance,
    InstanceSpec,
    InstanceType,
    MoveStrategy,
    OnNodeLoss,
    OnPartition,
    PlacementPolicy,
    SpreadTerm,
    Toleration,
)

__all__ = ["parse_manifest"]

V = TypeVar("V")

_TEXT_FIELDS = ("image", "kernel_path", "initrd_path", "kernel_args", "working_dir", "node")
_SPEC_KEYS = (
    *(
        "image",
        "cpu_cores",
        "memory_mb",
        "memory",
        "disk_gb",
        "disk",
        "kernel_path",
        "initrd_path",
        "kernel_args",
    ),
    *("command", "env", "working_dir", "pids_limit", "node_selector", "placement_policy", "node"),
    *("tolerations", "affinity", "anti_affinity", "spread", "availability", "move"),
    *MACHINE_KEYS,
    "restart",
)
_TOP_KEYS = ("name", "type", "project", "labels", "desired_state", "spec")


def parse_manifest(text: str, source: str, *, named: bool = True) -> list[Instance]:
    """The instances of a file. InvalidArgument (MANIFEST_INVALID) lists every mistake with its line.

    Without ``named`` they need no name: nothing is to be made of them.
    """
    reader = _Reader(source, ("name", "type", "spec") if named else ("type", "spec"))
    loader = yaml.SafeLoader(text)
    instances: list[Instance] = []
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None or (isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~")):
                continue
            instances.append(reader.instance(node))
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 0
        reader.wrong(line, "", f"not valid YAML: {getattr(exc, 'problem', None) or exc}")
    finally:
        loader.dispose()
    if not instances and not reader.problems:
        reader.wrong(1, "", "holds no instance: give at least name, type and spec")
    if reader.problems:
        lines = "; ".join(f"{v.field}: {v.description}" for v in reader.problems)
        raise InvalidArgument(
            lines, reason="MANIFEST_INVALID", metadata={"file": source}, violations=tuple(reader.problems)
        )
    return instances


@dataclass
class _Reader:
    """Walks the nodes of a document, so that each mistake has its line."""

    source: str
    required: tuple[str, ...]
    problems: list[FieldViolation] = field(default_factory=list)

    def wrong(self, line: int, key: str, description: str) -> None:
        where = f"{self.source}:{line}: {key}".rstrip(": ") if line else self.source
        self.problems.append(FieldViolation(where, description))

    def instance(self, node: yaml.Node) -> Instance:
        instance = Instance()
        keys = self.mapping(node, "", _TOP_KEYS)
        for key in self.required:
            if key not in keys:
                self.wrong(node.start_mark.line + 1, key, "is required")
        for key in ("name", "project"):
            if key in keys:
                setattr(instance, key, self.text(keys[key], key))
        if "type" in keys:
            instance.type = self.enum(
                keys["type"], "type", InstanceType, "INSTANCE_TYPE_", InstanceType.values
            )
        if "desired_state" in keys:
            allowed = (DesiredState.DESIRED_STATE_RUNNING, DesiredState.DESIRED_STATE_STOPPED)
            instance.desired_state = self.enum(
                keys["desired_state"], "desired_state", DesiredState, "DESIRED_STATE_", lambda: allowed
            )
        if "labels" in keys:
            instance.labels.update(self._texts(keys["labels"], "labels"))
        if "spec" in keys:
            self._spec(keys["spec"], instance)
        return instance

    def _spec(self, node: yaml.Node, instance: Instance) -> None:
        spec = instance.spec
        keys = self.mapping(node, "spec", _SPEC_KEYS)
        for one, other in (("memory_mb", "memory"), ("disk_gb", "disk")):
            if one in keys and other in keys:
                self.wrong(_line(keys[other]), f"spec.{other}", f"says the same as {one}: give one of them")
        for key, child in keys.items():
            path = f"spec.{key}"
            if key in _TEXT_FIELDS:
                setattr(spec, key, self.text(child, path))
            elif key == "cpu_cores":
                spec.cpu_cores = self.converted(child, path, quantities.cpu_cores, 0.0)
            elif key in ("memory_mb", "memory"):
                spec.memory_mb = self.converted(child, path, quantities.whole_mib, 0)
            elif key in ("disk_gb", "disk"):
                spec.disk_gb = self.converted(child, path, quantities.whole_gib, 0)
            elif key == "pids_limit":
                spec.pids_limit = self.integer(child, path)
            elif key == "command":
                spec.command.extend(self.words(child, path))
            elif key == "env":
                spec.env.update(self._texts(child, path))
            elif key == "placement_policy":
                spec.placement_policy = self.enum(
                    child, path, PlacementPolicy, "PLACEMENT_POLICY_", PlacementPolicy.values
                )
            elif key == "tolerations":
                spec.tolerations.extend(self.each(child, path, self._toleration))
            elif key == "affinity":
                spec.affinity.extend(self.each(child, path, self._affinity))
            elif key == "anti_affinity":
                spec.anti_affinity.extend(self.each(child, path, self._affinity))
            elif key == "spread":
                spec.spread.extend(self.each(child, path, self._spread))
            elif key == "restart":
                read_restart(self, child, path, spec)
            elif key == "move":
                self._move(child, path, spec)
            elif key == "availability":
                self._availability(child, path, spec.availability)
            elif key in MACHINE_KEYS:
                read_machine(self, key, child, path, spec)
            else:
                add_selector(instance, self.converted(child, path, parse_selector, ()))

    def _availability(self, node: yaml.Node, path: str, availability: Availability) -> None:
        keys = self.mapping(node, path, ("on_node_loss", "on_partition"))
        if "on_node_loss" in keys:
            availability.on_node_loss = self.enum(
                keys["on_node_loss"], f"{path}.on_node_loss", OnNodeLoss, "ON_NODE_LOSS_", OnNodeLoss.values
            )
        if "on_partition" in keys:
            availability.on_partition = self.enum(
                keys["on_partition"], f"{path}.on_partition", OnPartition, "ON_PARTITION_", OnPartition.values
            )

    def each(self, node: yaml.Node, path: str, read: Callable[[yaml.Node, str], Any]) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            self.wrong(_line(node), path, "must be a list")
            return []
        return [read(child, f"{path}[{number}]") for number, child in enumerate(node.value)]

    def _move(self, node: yaml.Node, path: str, spec: InstanceSpec) -> None:
        spec.move.SetInParent()
        for key, child in self.mapping(node, path, ("strategy", "healthy_after", "allow_disk_loss")).items():
            at = f"{path}.{key}"
            if key == "strategy":
                spec.move.strategy = self.enum(child, at, MoveStrategy, "MOVE_STRATEGY_", MoveStrategy.values)
            elif key == "healthy_after":
                seconds = self.converted(child, at, quantities.duration_s, 0.0)
                spec.move.healthy_after.FromNanoseconds(int(seconds * 1e9))
            else:
                spec.move.allow_disk_loss = self.flag(child, at)

    def _toleration(self, node: yaml.Node, path: str) -> Toleration:
        return self.converted(node, path, toleration_of, Toleration())

    def _affinity(self, node: yaml.Node, path: str) -> AffinityTerm:
        term = AffinityTerm()
        if isinstance(node, yaml.ScalarNode):
            return self.converted(node, path, affinity_of, term)
        keys = self.mapping(node, path, ("selector", "topology", "preferred", "weight"))
        if "preferred" in keys:
            term.preferred = self.flag(keys["preferred"], f"{path}.preferred")
        self._term(keys, path, term)
        return term

    def _spread(self, node: yaml.Node, path: str) -> SpreadTerm:
        term = SpreadTerm()
        if isinstance(node, yaml.ScalarNode):
            return self.converted(node, path, spread_of, term)
        self._term(self.mapping(node, path, ("selector", "topology", "weight")), path, term)
        return term

    def _term(self, keys: dict[str, yaml.Node], path: str, term: AffinityTerm | SpreadTerm) -> None:
        if "selector" in keys:
            none: tuple[Condition, ...] = ()
            found = self.converted(keys["selector"], f"{path}.selector", parse_selector, none)
            term.selector.extend(selector_of(found))
        if "topology" in keys:
            term.topology = self.text(keys["topology"], f"{path}.topology")
        if "weight" in keys:
            weight = self.integer(keys["weight"], f"{path}.weight")
            if not 0 <= weight <= 100:
                self.wrong(_line(keys["weight"]), f"{path}.weight", f"is {weight}: use 1 to 100")
            else:
                term.weight = weight

    def mapping(self, node: yaml.Node, path: str, known: tuple[str, ...]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.wrong(_line(node), path, f"must be a mapping with the keys {', '.join(known)}")
            return {}
        found: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            where = f"{path}.{key}" if path else key
            if key in found:
                self.wrong(_line(key_node), where, "is given twice: remove one")
            elif key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                self.wrong(_line(key_node), where, f"is not a known key: {hint}")
            else:
                found[key] = value_node
        return found

    def _scalar(self, node: yaml.Node, path: str, kind: str) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null":
            return str(node.value)
        self.wrong(_line(node), path, f"must be {kind}")
        return None

    def text(self, node: yaml.Node, path: str) -> str:
        return self._scalar(node, path, "text") or ""

    def integer(self, node: yaml.Node, path: str) -> int:
        text = self._scalar(node, path, "a number")
        if text is None:
            return 0
        try:
            number = int(text)
        except ValueError:
            self.wrong(_line(node), path, f"{shorten(text)} is not a whole number")
            return 0
        if not -(1 << 63) <= number < 1 << 63:
            self.wrong(_line(node), path, f"{shorten(text)} is out of range")
            return 0
        return number

    def flag(self, node: yaml.Node, path: str) -> bool:
        word = self._scalar(node, path, "true or false")
        if word not in (None, "true", "false"):
            self.wrong(_line(node), path, "must be true or false")
        return word == "true"

    def words(self, node: yaml.Node, path: str) -> list[str]:
        if not isinstance(node, yaml.SequenceNode):
            self.wrong(_line(node), path, "must be a list of words, such as [sh, -c, 'echo hello']")
            return []
        return [self._scalar(child, f"{path}[{i}]", "text") or "" for i, child in enumerate(node.value)]

    def _texts(self, node: yaml.Node, path: str) -> Mapping[str, str]:
        if not isinstance(node, yaml.MappingNode):
            self.wrong(_line(node), path, "must be a mapping of text to text")
            return {}
        return {
            str(key.value): self._scalar(value, f"{path}.{key.value}", "text") or ""
            for key, value in node.value
        }

    def enum(self, node: yaml.Node, path: str, enum: Any, prefix: str, values: Callable[[], Any]) -> Any:
        text = self._scalar(node, path, "text")
        names = {str(enum.Name(number)).removeprefix(prefix).lower(): number for number in values() if number}
        if text is None:
            return 0
        plain = text.removeprefix(prefix).lower()
        if plain not in names:
            self.wrong(_line(node), path, f"{shorten(text)} is not one of {', '.join(names)}")
        return names.get(plain, 0)

    def converted(self, node: yaml.Node, path: str, convert: Callable[[str, str], V], default: V) -> V:
        text = self._scalar(node, path, "text or a number")
        if text is None:
            return default
        try:
            return convert(path, text)
        except InvalidArgument as exc:
            self.wrong(_line(node), path, exc.violations[0].description)
            return default


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line + 1
    return line
