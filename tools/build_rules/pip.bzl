"""Packages from PyPI, by a lock file with hashes: one repository per package, fetched when a target needs it.

`pip_lock(name = "pypi", lock = ...)` defines `@pypi_<package>` for each package of the lock (lower case, `-` and `.`
as `_`), with the targets

    :pkg           py_library of the package and, through `deps`, of everything that it requires
    :bin           the programs that the wheel brings (`:site/bin/<program>` each)
    :site/<path>   any file of it

What a package requires is read from the lock too: pip-compile notes in `# via` comments who asked for a package.
Wheels only: building from an sdist would run its code with the host's compiler at fetch time. A package that exists as
nothing else is named in `sdists`, with a build backend of ours that takes the place of the one it asks for: see
libvirt_python.py. It is built anew when the host's compiler or the library it wraps changes.
"""

def _normalize(package):
    return package.split("[")[0].lower().replace("-", "_").replace(".", "_")

def parse_lock(text):
    """Parse what pip-compile --generate-hashes wrote.

    Args:
      text: content of the lock file.
    Returns:
      dict of normalized package name to struct(requirement, deps): the pip requirement with its hashes, and the
      sorted normalized names of the locked packages that it needs. Fails on a line without version or hash.
    """
    requirements = {}
    requiring = {}  # package -> those that asked for it
    current = None
    for raw in text.replace("\\\n", " ").split("\n"):
        line = raw.strip()
        if not line or line.startswith("--"):
            continue
        if line.startswith("#"):
            asked_by = line[1:].strip()
            if asked_by == "via":
                continue
            if asked_by.startswith("via "):
                asked_by = asked_by[len("via "):]
            if current and " " not in asked_by:
                requiring[current].append(_normalize(asked_by))
            continue
        words = [word for word in line.split(" ") if word]
        if "==" not in words[0]:
            fail("requirements.lock: %r has no exact version: run `make lock`" % line)
        if not [word for word in words if word.startswith("--hash=sha256:")]:
            fail("requirements.lock: %r has no hash: run `make lock`" % words[0])
        current = _normalize(words[0].split("==")[0])
        requirements[current] = " ".join(words)
        requiring[current] = []
    deps = {package: [] for package in requirements}
    for package, askers in requiring.items():
        for asker in askers:
            if asker in deps and asker != package:
                deps[asker].append(package)
    return {
        package: struct(requirement = requirements[package], deps = sorted(deps[package]))
        for package in requirements
    }

def _pip_lock_impl(rctx):
    lock = parse_lock(rctx.read(rctx.attr.lock))
    lines = [
        "load(\"@%s//tools/build_rules:pip.bzl\", \"pip_package\")" % rctx.attr.workspace,
        "",
        "def install_packages():",
    ]
    unknown = [package for package in rctx.attr.sdists.values() if package not in lock]
    if unknown:
        fail("pip_lock: sdists names %s, which %s does not" % (", ".join(unknown), rctx.attr.lock))
    backends = {package: str(backend) for backend, package in rctx.attr.sdists.items()}
    for package in sorted(lock):
        backend = ", backend = \"%s\"" % backends[package] if package in backends else ""
        lines.append("    pip_package(name = \"%s_%s\", requirement = \"%s\", deps = %r, workspace = \"%s\"%s)" % (
            rctx.name,
            package,
            lock[package].requirement,
            ["@%s_%s//:pkg" % (rctx.name, dep) for dep in lock[package].deps],
            rctx.attr.workspace,
            backend,
        ))
    rctx.file("packages.bzl", "\n".join(lines) + "\n")
    rctx.file("BUILD.bazel", "")

pip_lock = repository_rule(
    implementation = _pip_lock_impl,
    doc = "@name//:packages.bzl with install_packages(), which defines one pip_package per line of the lock.",
    attrs = {
        "lock": attr.label(allow_single_file = True, mandatory = True),
        "sdists": attr.label_keyed_string_dict(
            allow_files = True,
            doc = "build backend, a module -> the normalized name of the package that it builds from source",
        ),
        "workspace": attr.string(default = "hypervisor_repo", doc = "name of the repository that holds these rules"),
    },
)

# Left out of :pkg: names with spaces, which no input of an action may have, and files that pip writes about this very
# installation (they would make a build differ from machine to machine).
_BUILD = """load("@{workspace}//tools/build_rules:python.bzl", "py_library")

package(default_visibility = ["//visibility:public"])

exports_files(glob(["site/**"], exclude = ["site/**/* *"]))

filegroup(
    name = "bin",
    srcs = glob(["site/bin/*"]),
)

py_library(
    name = "pkg",
    srcs = glob(["site/**"], exclude = [
        "site/bin/**",
        "site/**/* *",
        "site/*.dist-info/INSTALLER",
        "site/*.dist-info/RECORD",
        "site/*.dist-info/REQUESTED",
        "site/*.dist-info/direct_url.json",
    ]),
    imports = ["site"],
    deps = {deps},
)
"""

def _pip_package_impl(rctx):
    python = str(rctx.path(Label("@python//:python")))
    rctx.file("requirements.txt", rctx.attr.requirement + "\n")
    how = ["--only-binary=:all:"]
    environment = {"PIP_ROOT_USER_ACTION": "ignore"}
    if rctx.attr.backend:
        # Read, so that another of either is a reason to build anew.
        rctx.read(Label("@libvirt_dev//:version"))
        environment["CC"] = str(rctx.path(Label("@cc//:cc")))
        rctx.symlink(rctx.attr.backend, "backend/setuptools/build_meta.py")
        rctx.file("backend/setuptools/__init__.py", "")
        environment["PYTHONPATH"] = str(rctx.path("backend"))

        # No cache: it may hold a wheel that something else has built.
        how = ["--no-binary=:all:", "--no-build-isolation", "--no-cache-dir"]
    result = rctx.execute([
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--require-hashes",
        "--no-compile",
        "--target=site",
        "--requirement=requirements.txt",
    ] + how, timeout = 1200, environment = environment)
    if result.return_code:
        fail("pip could not install %s\n%s\n%s" %
             (rctx.attr.requirement.split(" ")[0], result.stdout, result.stderr))

    # Byte code that holds neither times nor places: every sandboxed action would otherwise compile what it imports.
    # A package may hold files that are no Python 3.11 (templates, fixtures): those stay as they are.
    rctx.execute(
        [python, "-I", "-m", "compileall", "-qq", "-s", "site", "--invalidation-mode=unchecked-hash", "site"],
        environment = {"PYTHONHASHSEED": "0"},
    )
    rctx.file("BUILD.bazel", _BUILD.format(workspace = rctx.attr.workspace, deps = repr(rctx.attr.deps)))

pip_package = repository_rule(
    implementation = _pip_package_impl,
    attrs = {
        "requirement": attr.string(mandatory = True),
        # Strings, not labels: a repository is fetched when something builds with it, not when another one names it.
        "deps": attr.string_list(),
        "backend": attr.label(
            allow_single_file = True,
            doc = "build from source, by this module in the place of the build backend setuptools.build_meta",
        ),
        "workspace": attr.string(mandatory = True),
    },
    environ = ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE", "PIP_FIND_LINKS"],
)
