"""py_release: one tarball of several programs that runs without Bazel and without the checkout."""

load(":python.bzl", "PyBinaryInfo", "PyTreeInfo")

def _pair(file):
    # Top-level function: map_each may close over nothing.
    return file.short_path + "=" + file.path

def _py_release_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".tar.gz")
    args = ctx.actions.args()
    args.use_param_file("@%s", use_always = True)
    args.set_param_file_format("multiline")
    args.add("--out", out)
    args.add("--prefix", ctx.attr.prefix)
    args.add("--workspace", ctx.workspace_name)
    args.add("--version-file", ctx.file.version)
    inputs = [ctx.file._tool, ctx.file.version] + ctx.files.extras
    if ctx.attr.stamp:
        inputs.append(ctx.info_file)
        args.add("--status-file", ctx.info_file)
    files = []
    roots = []
    for binary in ctx.attr.binaries:
        args.add("--program", "%s=%s" % (binary[PyBinaryInfo].program, binary[PyBinaryInfo].module))
        files.append(binary[PyTreeInfo].files)
        roots.append(binary[PyTreeInfo].roots)
    for target, directory in ctx.attr.extras.items():
        for file in target[DefaultInfo].files.to_list():
            args.add("--extra", "%s=%s" % ("/".join([p for p in [directory, file.basename] if p]), file.path))
    args.add_all(depset(transitive = roots), before_each = "--root")
    closure = depset(transitive = files)
    args.add_all(closure, map_each = _pair)
    ctx.actions.run(
        outputs = [out],
        inputs = depset(inputs, transitive = [closure]),
        executable = ctx.executable._python,
        arguments = ["-I", "-S", ctx.file._tool.path, args],
        env = {"PYTHONHASHSEED": "0"},
        mnemonic = "PyRelease",
        progress_message = "Packing %s" % ctx.label,
    )
    return [DefaultInfo(files = depset([out]))]

py_release = rule(
    implementation = _py_release_impl,
    doc = """NAME.tar.gz holding PREFIX/bin/<program>, PREFIX/lib (all import roots of the binaries merged; a clash is an
error), PREFIX/VERSION and the extras. Only what the binaries need at run time is in it. The same inputs give the same
bytes. Built with --stamp, VERSION also names the commit.""",
    attrs = {
        "binaries": attr.label_list(providers = [PyBinaryInfo, PyTreeInfo], mandatory = True),
        "prefix": attr.string(mandatory = True, doc = "the one directory at the top of the tarball"),
        "version": attr.label(allow_single_file = True, mandatory = True, doc = "file that holds the version"),
        "extras": attr.label_keyed_string_dict(allow_files = True, doc = "files -> directory below PREFIX"),
        "stamp": attr.bool(default = False),
        "_tool": attr.label(default = "//tools/build_rules:make_release.py", allow_single_file = True),
        "_python": attr.label(default = "@python//:python", allow_single_file = True, executable = True, cfg = "exec"),
    },
)
