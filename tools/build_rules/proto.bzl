"""py_grpc_library: messages, gRPC services and type stubs from .proto files; py_grpc_descriptor_library: the same from
a FileDescriptorSet. protoc is the one of the locked grpcio-tools, the type stubs come from the locked mypy-protobuf.
"""

load(":python.bzl", "PyTreeInfo", "exec_pythonpath", "import_root", "tree_info")

ProtoInfo = provider(
    doc = ".proto files.",
    fields = {
        "sources": "depset of File: own and imported .proto files",
        "roots": "depset of string: import roots of the .proto files, in the source tree",
    },
)

_TOOLS = [
    "@pypi_googleapis_common_protos//:pkg",
    "@pypi_grpcio_tools//:pkg",
    "@pypi_mypy_protobuf//:pkg",
]

_RUNTIME = [
    "@pypi_googleapis_common_protos//:pkg",
    "@pypi_grpcio//:pkg",
    "@pypi_protobuf//:pkg",
]

_ATTRS = {
    "_tools": attr.label_list(default = _TOOLS, providers = [PyTreeInfo]),
    "_runtime": attr.label_list(default = _RUNTIME, providers = [PyTreeInfo]),
    "_generate": attr.label(default = "//tools/build_rules:generate_protos.py", allow_single_file = True),
    "_python": attr.label(default = "@python//:python", allow_single_file = True, executable = True, cfg = "exec"),
}

_SUFFIXES = ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"]

def _generate(ctx, outputs, inputs, out, arguments):
    ctx.actions.run(
        outputs = outputs,
        inputs = depset([ctx.file._generate], transitive = [inputs] + [tool[PyTreeInfo].files for tool in ctx.attr._tools]),
        executable = ctx.executable._python,
        arguments = ["-sS", ctx.file._generate.path, "--out", out] + arguments,
        env = {"PYTHONHASHSEED": "0", "PYTHONPATH": exec_pythonpath(ctx, ctx.attr._tools)},
        mnemonic = "PyGrpc",
        progress_message = "protoc %s" % ctx.label,
    )

def _py_grpc_library_impl(ctx):
    package = ctx.label.package
    outputs = []
    names = []
    for source in ctx.files.srcs:
        if not source.path.startswith(package + "/"):
            fail("%s is not below %s" % (source.path, package))
        name = source.path[len(package) + 1:]
        names.append(name)
        stem = name[:-len(".proto")]
        outputs += [ctx.actions.declare_file(stem + suffix) for suffix in _SUFFIXES]
    imported = [dep[ProtoInfo] for dep in ctx.attr.deps]
    sources = depset(ctx.files.srcs, transitive = [info.sources for info in imported])
    roots = depset([package], transitive = [info.roots for info in imported])
    arguments = []
    for root in roots.to_list():
        arguments += ["--proto-path", root]
    out = "/".join([ctx.bin_dir.path, package])
    _generate(ctx, outputs, sources, out, arguments + names)
    info = tree_info(depset(outputs), [import_root(ctx, ".")], ctx.attr.deps + ctx.attr._runtime)
    return [
        DefaultInfo(files = depset(outputs), runfiles = ctx.runfiles(transitive_files = info.files)),
        info,
        ProtoInfo(sources = sources, roots = roots),
    ]

py_grpc_library = rule(
    implementation = _py_grpc_library_impl,
    doc = """Generated modules of .proto files. The package's directory is the root of proto imports and of Python
imports: proto/hypervisor/v1/compute.proto becomes hypervisor.v1.compute_pb2. The files of google.protobuf and
googleapis-common-protos can be imported without a dep.""",
    attrs = dict(
        _ATTRS,
        srcs = attr.label_list(allow_files = [".proto"], mandatory = True),
        deps = attr.label_list(providers = [PyTreeInfo, ProtoInfo], doc = "py_grpc_library of imported .proto files"),
    ),
)

def _py_grpc_descriptor_library_impl(ctx):
    directory = ctx.actions.declare_directory(ctx.label.name)
    descriptors = ctx.file.descriptor_set
    _generate(ctx, [directory], depset([descriptors]), directory.path, ["--descriptor-set", descriptors.path])
    info = tree_info(depset([directory]), [import_root(ctx, ctx.label.name)], ctx.attr._runtime)
    return [
        DefaultInfo(files = depset([directory]), runfiles = ctx.runfiles(transitive_files = info.files)),
        info,
    ]

py_grpc_descriptor_library = rule(
    implementation = _py_grpc_descriptor_library_impl,
    doc = """Generated modules of a serialized FileDescriptorSet, for an API whose .proto files are not ours. The output is a
directory `name`, an import root of its own. Files of google.protobuf in the set are not generated: they are installed.""",
    attrs = dict(
        _ATTRS,
        descriptor_set = attr.label(allow_single_file = True, mandatory = True),
    ),
)

def _wheel_descriptor_set_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".pb")
    wheel = exec_pythonpath(ctx, [ctx.attr.wheel]).split(":")[0]
    ctx.actions.run(
        outputs = [out],
        inputs = depset(
            [ctx.file.script],
            transitive = [target[PyTreeInfo].files for target in [ctx.attr.wheel] + ctx.attr._tools],
        ),
        executable = ctx.executable._python,
        arguments = ["-sS", ctx.file.script.path, wheel, out.path],
        env = {"PYTHONHASHSEED": "0", "PYTHONPATH": exec_pythonpath(ctx, ctx.attr._tools)},
        mnemonic = "WheelDescriptors",
        progress_message = "Reading the descriptors of %s" % ctx.attr.wheel.label.workspace_name,
    )
    return [DefaultInfo(files = depset([out]))]

wheel_descriptor_set = rule(
    implementation = _wheel_descriptor_set_impl,
    doc = """NAME.pb, a FileDescriptorSet made by `script WHEEL_DIRECTORY NAME.pb` from the generated modules of a package.
The script reads the wheel's files and can import what protoc's Python plug-in needs, not the wheel itself.""",
    attrs = {
        "wheel": attr.label(providers = [PyTreeInfo], mandatory = True),
        "script": attr.label(allow_single_file = [".py"], mandatory = True),
        "_tools": attr.label_list(default = _TOOLS, providers = [PyTreeInfo]),
        "_python": _ATTRS["_python"],
    },
)

def _proto_descriptor_set_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name + ".binpb")
    sources = depset(transitive = [dep[ProtoInfo].sources for dep in ctx.attr.deps])
    roots = depset(transitive = [dep[ProtoInfo].roots for dep in ctx.attr.deps]).to_list()
    arguments = ["--write-descriptor-set", out.path]
    for root in roots:
        arguments += ["--proto-path", root]
    names = []
    for source in sources.to_list():
        names += [source.path[len(root) + 1:] for root in roots if source.path.startswith(root + "/")]
    _generate(ctx, [out], sources, out.dirname, arguments + names)
    return [DefaultInfo(files = depset([out]))]

proto_descriptor_set = rule(
    implementation = _proto_descriptor_set_impl,
    doc = "NAME.binpb: a FileDescriptorSet of .proto files and what they import, with their comments, for linters.",
    attrs = dict(
        _ATTRS,
        deps = attr.label_list(providers = [ProtoInfo], mandatory = True),
    ),
)
