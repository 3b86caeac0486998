"""The packages whose files are linted. tests/unit/tools/test_lint_sources.py compares this with what git tracks."""

LINTED_PACKAGES = [
    "//",
    "//bench",
    "//docs",
    "//ext",
    "//packaging",
    "//proto",
    "//proto/containerd",
    "//py/agent",
    "//py/core",
    "//py/ctl",
    "//py/server",
    "//py/wire",
    "//tests/contract",
    "//tests/docs",
    "//tests/e2e",
    "//tests/fault",
    "//tests/fault/store",
    "//tests/integration",
    "//tests/property",
    "//tests/support",
    "//tests/packaging",
    "//tests/unit",
    "//tests/unit/tools",
    "//tools",
    "//tools/build_rules",
    "//tools/build_rules/tests",
    "//tools/lint",
]

LINT_SOURCES = [package + ":lint_sources" for package in LINTED_PACKAGES]
