"""lint_sources: the files of a package that linters look at."""

def lint_sources(name = "lint_sources"):
    """Define the filegroup of everything lintable in this package, for the tests in //tools/lint.

    A unit test (tests/unit/tools) compares the sum of them with what git tracks, so that none is forgotten.

    Args:
      name: of the filegroup.
    """
    native.filegroup(
        name = name,
        srcs = native.glob(
            ["**/*.%s" % suffix for suffix in ["bzl", "proto", "py", "pyi", "pyx", "pxd", "sh"]] + ["**/BUILD.bazel"],
            exclude = ["bazel-*/**"],
        ),
        visibility = ["//:__subpackages__"],
    )
