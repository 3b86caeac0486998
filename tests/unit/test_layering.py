"""The dependency arrows between the parts, read from the import statements of every module.

core, ext and the generated stubs import nothing of ours; wire turns domain values into messages; server, agent and ctl
import those and never one another. Generated modules are met at the edges alone. Bazel's visibility holds the arrows
between parts as well; this also sees imports that happen to work because all parts share one namespace.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

WORKSPACE = Path(__file__).parents[2]
PARTS = ("core", "wire", "server", "agent", "ctl", "ext")

# part -> the other parts that it may import. hypervisor.v1 and hypervisor.agent.v1 (generated) have their own rule.
ALLOWED = {
    "core": set(),
    "ext": set(),
    "wire": {"core"},
    "server": {"core", "ext", "wire"},
    "agent": {"core", "ext", "wire"},
    "ctl": {"core", "ext", "wire"},
}

# The modules and packages, below hypervisor/<part>/, that may import generated code: `agents` also stands for agents_*.
EDGES = {
    "core": {"grpc_errors"},
    "ext": set(),
    "wire": {""},
    "server": {"agent_pool", "agents", "api", "app", "gateway", "store/etcd"},
    "agent": {"api", "app", "cluster_link", "drivers/containerd"},
    # A client is an edge all over: it sends and shows messages and has no domain values of its own.
    "ctl": {""},
}


def _directory(part: str) -> Path:
    return WORKSPACE / ("ext" if part == "ext" else f"py/{part}") / "hypervisor" / part


def _modules(part: str) -> list[Path]:
    return sorted(path for path in _directory(part).rglob("*") if path.suffix in {".py", ".pyi"})


def _imported(module: Path) -> Iterator[str]:
    """Dotted names that a module imports, also those inside functions and under TYPE_CHECKING."""
    tree = ast.parse(module.read_text(encoding="utf-8"), filename=str(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write hypervisor.<part>.<module>"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_generated(name: str) -> bool:
    return "_pb2" in name or name.startswith(
        ("hypervisor.v1.", "hypervisor.agent.v1.", "containerd_api.", "etcdserverpb.")
    )


def _part_of(name: str) -> str | None:
    words = name.split(".")
    if words[0] != "hypervisor" or len(words) < 2 or _is_generated(name):
        return None
    return words[1]


def _is_edge(part: str, module: Path) -> bool:
    inside = module.relative_to(_directory(part)).with_suffix("").as_posix()
    return any(edge in {"", inside} or inside.startswith((f"{edge}/", f"{edge}_")) for edge in EDGES[part])


def test_every_part_has_modules_to_look_at() -> None:
    assert {part for part in PARTS if not _modules(part)} == set()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_the_parts_below_it(part: str) -> None:
    wrong = [
        f"{module.relative_to(WORKSPACE)} imports {name}"
        for module in _modules(part)
        for name in _imported(module)
        if (other := _part_of(name)) is not None and other != part and other not in ALLOWED[part]
    ]

    assert wrong == []


@pytest.mark.parametrize("part", PARTS)
def test_generated_code_is_imported_at_the_edges_only(part: str) -> None:
    wrong = [
        f"{module.relative_to(WORKSPACE)} imports {name}"
        for module in _modules(part)
        if not _is_edge(part, module)
        for name in _imported(module)
        if _is_generated(name)
    ]

    assert wrong == []


def test_the_etcd_api_is_known_to_its_backend_only() -> None:
    wrong = [
        str(module.relative_to(WORKSPACE))
        for part in PARTS
        for module in _modules(part)
        if not (module.parent == _directory("server") / "store" and module.name.startswith("etcd"))
        and any(name.startswith("etcdserverpb") for name in _imported(module))
    ]

    assert wrong == []


def test_the_containerd_api_is_known_to_its_driver_only() -> None:
    driver = _directory("agent") / "drivers" / "containerd"
    wrong = [
        str(module.relative_to(WORKSPACE))
        for part in PARTS
        for module in _modules(part)
        if driver not in module.parents
        and any(name.startswith("containerd_api") for name in _imported(module))
    ]

    assert wrong == []


def test_namespaces_hold_no_init_module() -> None:
    namespaces = [_directory(part).parent for part in PARTS] + [
        _directory("agent"),
        WORKSPACE / "proto" / "hypervisor",
    ]

    assert [str(path) for path in namespaces if (path / "__init__.py").exists()] == []


def test_packages_below_the_namespaces_have_an_init_module() -> None:
    wrong = [
        str(module.parent.relative_to(WORKSPACE))
        for part in PARTS
        for module in _modules(part)
        if module.parent != _directory("agent") and not (module.parent / "__init__.py").exists()
    ]

    assert wrong == []


def test_nothing_is_imported_through_py() -> None:
    wrong = [
        str(module.relative_to(WORKSPACE))
        for part in PARTS
        for module in _modules(part)
        if any(name == "py" or name.startswith("py.") for name in _imported(module))
    ]

    assert wrong == []
