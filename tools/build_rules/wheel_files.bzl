"""wheel_files: some files of one wheel on PyPI, by their hashes; for programs that a wheel ships beside code for another
Python, which is neither installed nor run."""

def _wheel_files_impl(rctx):
    pins = rctx.path(rctx.attr.pins)
    script = rctx.path(Label("//tools/build_rules:wheel_files.py"))
    python = str(rctx.path(Label("@python//:python")))
    result = rctx.execute(
        [python, "-I", script, pins, "."],
        timeout = 1200,
        environment = {"PIP_ROOT_USER_ACTION": "ignore"},
    )
    if result.return_code:
        fail("%s: %s\n%s" % (rctx.attr.pins, result.stdout, result.stderr))
    names = sorted(json.decode(rctx.read(pins))["files"])
    rctx.file("BUILD.bazel", "exports_files(%r, visibility = [\"//visibility:public\"])\n" % names)

wheel_files = repository_rule(
    implementation = _wheel_files_impl,
    doc = "Files of a wheel as @name//:<file>, executable; wheel_files.py says what stands in `pins`.",
    attrs = {"pins": attr.label(allow_single_file = True, mandatory = True)},
    environ = ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE", "PIP_FIND_LINKS"],
)
