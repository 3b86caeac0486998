"""A test of the lock file's parser, which is Starlark and so tested in Starlark."""

load("//tools/build_rules:pip.bzl", "parse_lock")

_LOCK = """\
# written by pip-compile
Alpha-Beta==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via -r requirements.in
gamma.delta[extra]==2.5 \\
    --hash=sha256:cc
    # via
    #   -r requirements.in
    #   Alpha-Beta
epsilon==3 ; python_version < "4" \\
    --hash=sha256:dd
    # via
    #   alpha-beta
    #   gamma.delta
"""

def _check(problems, what, found, expected):
    if found != expected:
        problems.append("%s: found %r, expected %r" % (what, found, expected))

def _parse_lock_test_impl(ctx):
    problems = []
    lock = parse_lock(_LOCK)
    _check(problems, "packages", sorted(lock), ["alpha_beta", "epsilon", "gamma_delta"])
    _check(problems, "deps of alpha-beta", lock["alpha_beta"].deps, ["epsilon", "gamma_delta"])
    _check(problems, "deps of gamma.delta", lock["gamma_delta"].deps, ["epsilon"])
    _check(problems, "deps of epsilon", lock["epsilon"].deps, [])
    _check(
        problems,
        "requirement with two hashes",
        lock["alpha_beta"].requirement,
        "Alpha-Beta==1.0 --hash=sha256:aa --hash=sha256:bb",
    )
    _check(
        problems,
        "requirement with a marker",
        lock["epsilon"].requirement,
        "epsilon==3 ; python_version < \"4\" --hash=sha256:dd",
    )
    script = ctx.actions.declare_file(ctx.label.name)
    lines = ["echo %s" % repr(problem.replace("'", "\"")) for problem in problems]
    ctx.actions.write(script, "\n".join(["#!/bin/sh"] + lines + ["exit %d" % min(len(problems), 1)]) + "\n", is_executable = True)
    return [DefaultInfo(executable = script)]

parse_lock_test = rule(
    implementation = _parse_lock_test_impl,
    test = True,
)
