"""The host's interpreter and C compiler, and the libraries of its that Python packages wrap.

The first two are wrapped in scripts that name their versions, so that a change of either changes the keys of the actions
that run it. These, the C library and /bin/sh are all that a build takes from the host.
"""

_PROBE = """
import json, os, sys, sysconfig
exe = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
print(json.dumps({
    "exe": exe,
    "version": "%d.%d" % sys.version_info[:2],
    "full": sys.version.replace(chr(10), " "),
    "include": sysconfig.get_paths(vars={"base": sys.base_prefix, "installed_base": sys.base_prefix})["include"],
    "ext_suffix": sysconfig.get_config_var("EXT_SUFFIX"),
}))
"""

_PYTHON_BUILD = """package(default_visibility = ["//visibility:public"])

exports_files(["python"])

filegroup(
    name = "headers",
    srcs = glob(["include/**/*.h"]),
)
"""

def _host_python_impl(rctx):
    names = ["python" + rctx.attr.version, "/usr/bin/python" + rctx.attr.version, "python3"]
    if rctx.os.environ.get("BAZEL_PYTHON"):
        names = [rctx.os.environ["BAZEL_PYTHON"]]
    rctx.file("probe.py", _PROBE)
    tried = []
    for name in names:
        path = rctx.path(name) if name.startswith("/") else rctx.which(name)
        if not path or not path.exists:
            tried.append(name + ": not found")
            continue
        result = rctx.execute([path, "-I", rctx.path("probe.py")])
        if result.return_code:
            # For example a pyenv shim without that version.
            tried.append("%s: %s" % (path, result.stderr.strip()))
            continue
        info = json.decode(result.stdout)
        if info["version"] != rctx.attr.version:
            tried.append("%s is Python %s" % (path, info["version"]))
            continue
        if not rctx.path(info["include"] + "/Python.h").exists:
            tried.append("%s has no Python.h: install python%s-dev" % (path, info["version"]))
            continue
        if rctx.execute([path, "-I", "-m", "pip", "--version"]).return_code:
            tried.append("%s has no pip: install python3-pip" % path)
            continue
        rctx.symlink(info["include"], "include")
        rctx.file("python", "#!/bin/sh\n# %s\nexec %s \"$@\"\n" % (info["full"], info["exe"]), executable = True)
        rctx.file("defs.bzl", "EXT_SUFFIX = \"%s\"\nPYTHON_VERSION = \"%s\"\n" % (info["ext_suffix"], info["version"]))
        rctx.file("BUILD.bazel", _PYTHON_BUILD)
        return
    fail("no CPython %s with headers and pip found: run tools/setup, or set BAZEL_PYTHON to one. Tried: %s" %
         (rctx.attr.version, "; ".join(tried)))

host_python = repository_rule(
    implementation = _host_python_impl,
    doc = "@name//:python (the interpreter), @name//:headers, @name//:defs.bzl (EXT_SUFFIX, PYTHON_VERSION).",
    attrs = {"version": attr.string(mandatory = True, doc = "major.minor")},
    environ = ["BAZEL_PYTHON", "PATH"],
    local = True,
)

def _host_cc_impl(rctx):
    name = rctx.os.environ.get("CC") or "cc"
    path = rctx.path(name) if name.startswith("/") else rctx.which(name)
    if not path or not path.exists:
        fail("no C compiler %r: run tools/setup, or set CC to one" % name)
    version = rctx.execute([path, "--version"]).stdout.split("\n")[0]
    rctx.file("cc", "#!/bin/sh\n# %s\nexec %s \"$@\"\n" % (version, path), executable = True)
    rctx.file("BUILD.bazel", "exports_files([\"cc\"])\n")

host_cc = repository_rule(
    implementation = _host_cc_impl,
    doc = "@name//:cc, the host's C compiler.",
    environ = ["CC", "PATH"],
    local = True,
)

def _host_library_impl(rctx):
    found = rctx.execute(["pkg-config", "--modversion", rctx.attr.package])
    if found.return_code:
        fail("no %s for development: run tools/setup\n%s%s" % (rctx.attr.package, found.stdout, found.stderr))
    rctx.file("version", found.stdout)
    rctx.file("BUILD.bazel", "exports_files([\"version\"])\n")

host_library = repository_rule(
    implementation = _host_library_impl,
    doc = "@name//:version, that of a library of the host with its headers: what depends on it follows its changes.",
    attrs = {"package": attr.string(mandatory = True, doc = "name that pkg-config knows it by")},
    environ = ["PATH", "PKG_CONFIG_PATH"],
    local = True,
)

def _no_coverage_tools_impl(rctx):
    for name in ["coverage_report_generator", "Main"]:
        rctx.file(name, "#!/bin/sh\necho 'no coverage tools: see WORKSPACE' >&2\nexit 1\n", executable = True)
    rctx.file("BUILD.bazel", "exports_files([\"coverage_report_generator\", \"Main\"])\n")

no_coverage_tools = repository_rule(
    implementation = _no_coverage_tools_impl,
    doc = "Stands in for @remote_coverage_tools, which Bazel would download for every test.",
)
