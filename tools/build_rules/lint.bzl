"""tool_test: a test that is a native program run over source files."""

load(":python.bzl", "rlocation")

_SCRIPT = """#!/usr/bin/env bash
set -euo pipefail
cd "$TEST_SRCDIR/$TEST_WORKSPACE"
exec "$TEST_SRCDIR/%{tool}" %{args}
"""

def _quote(word):
    return "'" + word.replace("'", "'\\''") + "'"

def _tool_test_impl(ctx):
    suffixes = tuple(ctx.attr.suffixes)
    scripts = [file.short_path for file in ctx.files.scripts]
    sources = sorted(scripts + [
        file.short_path
        for file in ctx.files.srcs
        if not file.short_path.startswith("../") and (not suffixes or file.basename.endswith(suffixes))
    ])
    if ctx.files.srcs and not sources:
        fail("no file of srcs ends with any of %r" % ctx.attr.suffixes)
    script = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.write(
        script,
        _SCRIPT.replace("%{tool}", rlocation(ctx, ctx.file.tool))
            .replace("%{args}", " ".join([_quote(word) for word in ctx.attr.tool_args + sources])),
        is_executable = True,
    )
    return [DefaultInfo(
        executable = script,
        runfiles = ctx.runfiles(files = [ctx.file.tool] + ctx.files.srcs + ctx.files.scripts + ctx.files.data),
    )]

tool_test = rule(
    implementation = _tool_test_impl,
    doc = "Runs `tool tool_args <srcs>` in the workspace's directory; passes where that exits with 0.",
    attrs = {
        "tool": attr.label(allow_single_file = True, mandatory = True),
        "tool_args": attr.string_list(),
        "srcs": attr.label_list(allow_files = True, doc = "given to the tool after tool_args"),
        "suffixes": attr.string_list(doc = "only srcs with one of these ends are given to the tool"),
        "scripts": attr.label_list(allow_files = True, doc = "given to the tool whatever their names end with"),
        "data": attr.label_list(allow_files = True),
    },
    test = True,
)

_RUN_SCRIPT = """#!/usr/bin/env bash
set -euo pipefail
tool="$(dirname "$PWD")/%{tool}"
cd "${BUILD_WORKSPACE_DIRECTORY:?run this by bazel run}"
exec "$tool" "$@"
"""

def _tool_binary_impl(ctx):
    script = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.write(script, _RUN_SCRIPT.replace("%{tool}", rlocation(ctx, ctx.file.tool)), is_executable = True)
    return [DefaultInfo(executable = script, runfiles = ctx.runfiles(files = [ctx.file.tool]))]

tool_binary = rule(
    implementation = _tool_binary_impl,
    doc = "`bazel run` of it runs the tool in the checkout.",
    attrs = {"tool": attr.label(allow_single_file = True, mandatory = True)},
    executable = True,
)
