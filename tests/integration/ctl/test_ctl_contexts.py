"""Contexts, their file and its mistakes; shell completion."""

import os
import stat
import subprocess
import sys

import pytest


@pytest.fixture
def plain(ctl):
    """Without a server in the environment."""
    del ctl.environ["HYPERVISOR_SERVER"]
    return ctl


def test_a_context_is_made_used_shown_and_deleted(server, plain, tmp_path):
    server.add_node("node-1")
    token = tmp_path / "token"
    token.write_text("from-a-file\n")

    assert plain("context", "set", "lab", "--server", server.address, "--token-file", str(token)).code == 0
    assert plain("node", "list", "-q").out == "node-1\n"
    assert ("authorization", "Bearer from-a-file") in server.metadata
    assert plain("context", "show", "-o", "json").json == {
        "name": "lab",
        "server": server.address,
        "tls": False,
        "token": True,
    }
    assert plain("context", "list", "-q").out == "lab\n"
    assert plain("context", "delete", "lab").code == 0
    assert plain("context", "use", "lab").code == 3


def test_the_file_can_be_read_by_its_owner_alone(plain):
    plain("context", "set", "lab", "--server", "h:1", "--token", "secret")

    path = plain.environ["HYPERVISOR_CTL_CONFIG"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_tokens_are_never_shown(plain):
    plain("context", "set", "lab", "--server", "h:1", "--token", "hush-hush")

    for arguments in (
        ("context", "list", "-o", "yaml"),
        ("context", "show"),
        ("context", "show", "lab", "-o", "json"),
    ):
        assert "hush-hush" not in plain(*arguments).out


def test_changing_a_context_keeps_what_is_not_given(plain):
    plain("context", "set", "lab", "--server", "h:1", "--ca-file", "/ca.pem")
    plain("context", "set", "lab", "--server", "h:2")

    assert plain("context", "show", "lab", "-o", "json").json == {
        "name": "lab",
        "server": "h:2",
        "tls": True,
        "ca_file": "/ca.pem",
        "token": False,
    }


def test_an_address_given_directly_does_not_get_the_token_of_the_context(server, plain):
    plain("context", "set", "lab", "--server", "127.0.0.1:1", "--token", "secret")

    assert plain("node", "list", "--server", server.address).code == 0
    assert not [value for key, value in server.metadata if key == "authorization"]


def test_a_context_that_is_not_there_ends_with_3_and_names_those_that_are(plain):
    plain("context", "set", "lab", "--server", "h:1")

    done = plain("node", "list", "--context", "lap")

    assert (done.code, "(known: lab)" in done.err) == (3, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contexts: {a: {sever: x}}", "contexts.a.sever: is not a known key: did you mean server?"),
        ("contexts: {a: {server: [1]}}", "contexts.a.server: must be text, not list"),
        ("contexts: [a]", "contexts: must be a mapping"),
        ("curent: a", "curent: is not a known key: did you mean current?"),
        ("contexts: {a: {server: x, tls: {cert_file: y}}}", "cert_file and key_file go together"),
        ("a: [", "not valid YAML"),
        ("- a", "must be a mapping"),
    ],
)
def test_mistakes_in_the_file_are_named(plain, text, said):
    with open(plain.environ["HYPERVISOR_CTL_CONFIG"], "w", encoding="utf-8") as file:
        file.write(text)

    done = plain("node", "list")

    assert done.code == 2
    assert said in done.err


def test_a_certificate_that_is_not_there_is_named(plain):
    plain("context", "set", "lab", "--server", "h:1", "--ca-file", "/no/such.pem")

    done = plain("node", "list")

    assert (done.code, "/no/such.pem cannot be read" in done.err) == (2, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_this_program(plain, shell):
    script = plain("completion", shell).out

    assert "_HYPERVISOR_CTL_COMPLETE" in script
    assert "hypervisor-ctl" in script


def test_the_bash_script_is_valid(plain, tmp_path):
    script = tmp_path / "complete.bash"
    script.write_text(plain("completion", "bash").out)

    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)


def completions(ctl, words, current):
    done = subprocess.run(
        [sys.executable, "-m", "hypervisor.ctl"],
        env={
            **os.environ,
            **ctl.environ,
            "_HYPERVISOR_CTL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(current),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_commands_options_and_names_complete(server, ctl):
    server.add_node("node-1")
    server.add_instance("web-1")
    server.add_instance("db")

    assert completions(ctl, "hypervisor-ctl inst", 1) == ["instance"]
    assert "--watch" in completions(ctl, "hypervisor-ctl instance list --w", 3)
    assert completions(ctl, "hypervisor-ctl instance get we", 3) == ["web-1"]
    assert completions(ctl, "hypervisor-ctl node get ", 3) == ["node-1"]


def test_completion_without_a_server_is_silent(server, ctl):
    server.stop()

    assert completions(ctl, "hypervisor-ctl instance get we", 3) == []
