"""Python rules without outside dependencies: py_library, py_binary, py_test, py_tests.

No rules_python and no rules_cc: both are downloads from places other than a package registry, and none of their
releases loads in all of Bazel 4.2 to 7. Differences to the native rules: nothing ever creates an `__init__.py` (our
packages are PEP 420 namespaces), a binary names its main *module*, and tests run under pytest.
"""

PyTreeInfo = provider(
    doc = "A set of files to import from.",
    fields = {
        "files": "depset of File: everything needed at run time, of this target and its deps",
        "roots": "depset of string: import roots, as paths below the runfiles directory",
    },
)

PyBinaryInfo = provider(
    doc = "A program.",
    fields = {
        "module": "string: dotted name of the module that runs as __main__",
        "program": "string: file name of the program",
    },
)

def rlocation(ctx, file):
    """Path of a file below the runfiles directory."""
    if file.short_path.startswith("../"):
        return file.short_path[3:]
    return ctx.workspace_name + "/" + file.short_path

def import_root(ctx, path):
    """Path below the runfiles directory of an import root that is given relative to the package."""
    repository = ctx.label.workspace_name or ctx.workspace_name
    return "/".join([part for part in [repository, ctx.label.package, path] if part and part != "."])

def tree_info(files, roots, deps):
    """PyTreeInfo of some files, their import roots and what they depend on."""
    return PyTreeInfo(
        files = depset(transitive = [files] + [dep[PyTreeInfo].files for dep in deps]),
        roots = depset(roots, transitive = [dep[PyTreeInfo].roots for dep in deps], order = "preorder"),
    )

def exec_pythonpath(ctx, tools):
    """PYTHONPATH with which an action can import the given targets (PyTreeInfo)."""
    roots = depset(transitive = [tool[PyTreeInfo].roots for tool in tools], order = "preorder").to_list()
    own = ctx.workspace_name + "/"
    return ":".join([root[len(own):] if root.startswith(own) else "external/" + root for root in roots])

def _own_tree(ctx):
    files = depset(ctx.files.srcs, transitive = [depset(ctx.files.data)])
    return tree_info(files, [import_root(ctx, path) for path in ctx.attr.imports], ctx.attr.deps)

def _merge_runfiles(ctx, runfiles):
    for target in ctx.attr.data + ctx.attr.deps:
        runfiles = runfiles.merge(target[DefaultInfo].default_runfiles)
    return runfiles

_LIBRARY_ATTRS = {
    "srcs": attr.label_list(allow_files = True, doc = "modules, stubs (.pyi), py.typed"),
    "data": attr.label_list(allow_files = True, doc = "files read at run time"),
    "deps": attr.label_list(providers = [PyTreeInfo]),
    "imports": attr.string_list(
        default = ["."],
        doc = "import roots, relative to the package; by default the package's own directory",
    ),
}

def _py_library_impl(ctx):
    info = _own_tree(ctx)
    return [
        DefaultInfo(
            files = depset(ctx.files.srcs),
            runfiles = _merge_runfiles(ctx, ctx.runfiles(transitive_files = info.files)),
        ),
        info,
    ]

py_library = rule(
    implementation = _py_library_impl,
    doc = "Modules. Its default files are its own sources, for linters.",
    attrs = _LIBRARY_ATTRS,
)

# -I: no environment, no user site, no script directory; -S: no site-packages of the host. Only declared deps exist.
_LAUNCHER = """#!/usr/bin/env bash
set -euo pipefail
self="$0"
[[ "$self" == /* ]] || self="$PWD/$self"
while true; do
  if [[ -d "$self.runfiles" ]]; then
    runfiles="$self.runfiles"
    break
  fi
  if [[ "$self" == *.runfiles/* ]]; then
    runfiles="${self%.runfiles/*}.runfiles"
    break
  fi
  if [[ -L "$self" ]]; then
    target="$(readlink "$self")"
    [[ "$target" == /* ]] || target="$(dirname "$self")/$target"
    self="$target"
    continue
  fi
  if [[ -n "${RUNFILES_DIR:-}" ]]; then
    runfiles="$RUNFILES_DIR"
    break
  fi
  echo "$0: no runfiles found" >&2
  exit 1
done
export RUNFILES_DIR="$runfiles"
exec "$runfiles/%{python}" -I -S "$runfiles/%{boot}" "$@"
"""

# Child processes that a program starts with sys.executable import the same files, through PYTHONPATH.
_BOOT = """import os
import runpy
import sys

runfiles = os.environ["RUNFILES_DIR"]
roots = [os.path.join(runfiles, root) for root in %{roots}]
sys.path[0:0] = roots
os.environ["PYTHONPATH"] = os.pathsep.join(roots)
os.environ["PYTHONNOUSERSITE"] = "1"
os.environ.update(%{env})
for name, path in %{path_env}.items():
    os.environ[name] = os.path.join(runfiles, path)
sys.argv[0] = %{program}
sys.argv[1:1] = %{args}
runpy.run_module(%{module}, run_name="__main__", alter_sys=True)
"""

def _program(ctx, module, args):
    info = _own_tree(ctx)
    path_env = {}
    path_files = []
    for target, variable in ctx.attr.path_env.items():
        files = target[DefaultInfo].files.to_list()
        if len(files) != 1:
            fail("path_env: %s has %d files, %s can name one" % (target.label, len(files), variable))
        path_env[variable] = rlocation(ctx, files[0])
        path_files.append(files[0])
    boot = ctx.actions.declare_file(ctx.label.name + ".boot.py")
    text = _BOOT
    for key, value in {
        "args": args,
        "env": ctx.attr.env,
        "module": module,
        "path_env": path_env,
        "program": ctx.label.name,
        "roots": info.roots.to_list(),
    }.items():
        text = text.replace("%{" + key + "}", repr(value))
    ctx.actions.write(boot, text)
    launcher = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.write(
        launcher,
        _LAUNCHER.replace("%{python}", rlocation(ctx, ctx.file._python)).replace("%{boot}", rlocation(ctx, boot)),
        is_executable = True,
    )
    runfiles = ctx.runfiles(files = [launcher, boot, ctx.file._python] + path_files, transitive_files = info.files)
    return [
        DefaultInfo(executable = launcher, files = depset([launcher]), runfiles = _merge_runfiles(ctx, runfiles)),
        info,
    ]

_PROGRAM_ATTRS = dict(
    _LIBRARY_ATTRS,
    env = attr.string_dict(doc = "environment variables to set"),
    path_env = attr.label_keyed_string_dict(
        allow_files = True,
        doc = "target with one file -> environment variable that is to hold the file's absolute path",
    ),
    _python = attr.label(default = "@python//:python", allow_single_file = True),
)

def _py_binary_impl(ctx):
    return _program(ctx, ctx.attr.main, ctx.attr.fixed_args) + [
        PyBinaryInfo(module = ctx.attr.main, program = ctx.label.name),
    ]

_BINARY_ATTRS = dict(
    _PROGRAM_ATTRS,
    main = attr.string(mandatory = True, doc = "dotted name of the module to run"),
    fixed_args = attr.string_list(doc = "arguments that come before those of the caller"),
)

py_binary = rule(
    implementation = _py_binary_impl,
    doc = "A program: runs the module `main`.",
    attrs = _BINARY_ATTRS,
    executable = True,
)

py_program_test = rule(
    implementation = _py_binary_impl,
    doc = "A program that is a test by its exit code, such as a linter. For pytest there is py_test.",
    attrs = _BINARY_ATTRS,
    test = True,
)

def _py_test_impl(ctx):
    tests = [rlocation(ctx, file) for file in ctx.files.srcs if file.basename.startswith("test_")]
    if not tests:
        fail("srcs holds no test_*.py")
    return _program(ctx, "bazel_pytest", tests)

_py_test = rule(
    implementation = _py_test_impl,
    attrs = _PROGRAM_ATTRS,
    test = True,
)

def py_test(name, srcs, deps = [], imports = [], **kwargs):
    """pytest over the test_*.py of srcs, configured by //:pyproject.toml; fails where it finds no test.

    `shard_count` splits the tests over that many processes, `--test_filter=EXPR` becomes pytest's `-k EXPR`,
    `--test_arg=ARG` goes to pytest. pytest, pytest-asyncio, pytest-timeout, pytest-benchmark and hypothesis need not
    stand in deps.

    Args:
      name: of the target.
      srcs: test modules, conftest.py and what lies beside them.
      deps: targets to import.
      imports: import roots, relative to the package.
      **kwargs: data, env, path_env, and what every test rule has (size, tags, shard_count, ...).
    """
    _py_test(
        name = name,
        srcs = srcs,
        deps = deps + ["//tools/build_rules:bazel_pytest"],
        imports = imports,
        **kwargs
    )

def py_tests(srcs, shared = [], shard_counts = {}, suffix = "", **kwargs):
    """One py_test per test module, named after it: failures, results in the cache and reruns are per file.

    Args:
      srcs: test modules, as of glob(["**/test_*.py"]).
      shared: files that go with each of them, such as conftest.py.
      shard_counts: test module -> number of shards, for those with many slow tests.
      suffix: of the targets' names, where the same modules are run in another way too.
      **kwargs: as of py_test.
    """
    for src in srcs:
        py_test(
            name = src[:-len(".py")] + suffix,
            srcs = [src] + shared,
            shard_count = shard_counts.get(src),
            **kwargs
        )
