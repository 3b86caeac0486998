"""cython_extension: a .pyx as an importable shared library, by the pinned Cython and the host's C compiler."""

load("@python//:defs.bzl", "EXT_SUFFIX")
load(":python.bzl", "PyTreeInfo", "exec_pythonpath", "import_root", "tree_info")

def _cython_extension_impl(ctx):
    pyx = ctx.file.src
    package = ctx.label.package
    if not pyx.path.startswith(package + "/"):
        fail("%s is not below %s" % (pyx.path, package))

    # The package's directory is the import root: ext/hypervisor/ext/_ring.pyx is the module hypervisor.ext._ring.
    stem = pyx.path[len(package) + 1:-len(".pyx")]
    c_source = ctx.actions.declare_file(stem + ".c")
    library = ctx.actions.declare_file(stem + EXT_SUFFIX)
    ctx.actions.run(
        outputs = [c_source],
        inputs = depset([pyx] + ctx.files.pxds, transitive = [ctx.attr._cython[PyTreeInfo].files]),
        executable = ctx.executable._python,
        arguments = ["-sS", "-m", "cython", "-3", "--fast-fail", "-Werror", "-I", package] + [
            word
            for directive in ctx.attr.directives
            for word in ("-X", directive)
        ] + ["--module-name", stem.replace("/", "."), "-o", c_source.path, pyx.path],
        env = {"PYTHONHASHSEED": "0", "PYTHONPATH": exec_pythonpath(ctx, [ctx.attr._cython])},
        mnemonic = "Cython",
        progress_message = "Cython %s" % pyx.short_path,
    )
    include = ctx.files._headers[0].path.split("/include/")[0] + "/include"
    ctx.actions.run(
        outputs = [library],
        inputs = depset([c_source] + ctx.files.hdrs, transitive = [depset(ctx.files._headers)]),
        executable = ctx.executable._cc,
        # Same flags as CPython's own for extensions; no debug information and no build id: both hold paths or chance.
        arguments = ["-shared", "-fPIC", "-O2", "-g0", "-DNDEBUG", "-fwrapv", "-fno-strict-aliasing"] + ctx.attr.copts +
                    ["-I" + include, "-I" + package, c_source.path, "-o", library.path, "-Wl,--build-id=none,-s"] +
                    ctx.attr.linkopts,
        env = {"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": "0"},
        mnemonic = "CythonCompile",
        progress_message = "Compiling %s" % library.short_path,
    )
    info = tree_info(depset([library]), [import_root(ctx, ".")], ctx.attr.deps)
    return [
        DefaultInfo(files = depset([library]), runfiles = ctx.runfiles(transitive_files = info.files)),
        info,
        OutputGroupInfo(c = depset([c_source])),
    ]

cython_extension = rule(
    implementation = _cython_extension_impl,
    doc = "An extension module. Its name follows from the path of src below the package, not from `name`.",
    attrs = {
        "src": attr.label(allow_single_file = [".pyx"], mandatory = True),
        "pxds": attr.label_list(allow_files = [".pxd", ".pxi"], doc = "declarations that src cimports"),
        "hdrs": attr.label_list(allow_files = [".h"]),
        "deps": attr.label_list(providers = [PyTreeInfo]),
        "directives": attr.string_list(doc = "compiler directives, as boundscheck=True"),
        "copts": attr.string_list(),
        "linkopts": attr.string_list(),
        "_cython": attr.label(default = "@pypi_cython//:pkg", providers = [PyTreeInfo]),
        "_headers": attr.label(default = "@python//:headers"),
        "_python": attr.label(default = "@python//:python", allow_single_file = True, executable = True, cfg = "exec"),
        "_cc": attr.label(default = "@cc//:cc", allow_single_file = True, executable = True, cfg = "exec"),
    },
)
