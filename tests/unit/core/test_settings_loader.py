"""The configuration loader on a small tree of keys of its own. (Files are the only thing it reads.)"""

from pathlib import Path
from typing import ClassVar

import pydantic
import pytest

from hypervisor.core.settings import (
    Address,
    Duration,
    Loaded,
    Section,
    Settings,
    SettingsError,
    environment_name,
    known_keys,
    load,
    split_address,
)


class Engine(Section):
    """The engine."""

    address: Address = pydantic.Field(default="127.0.0.1:1", description="Where.")
    timeout: Duration = pydantic.Field(default=10.0, gt=0, description="How long.")
    fuels: tuple[str, ...] = pydantic.Field(default=("coal",), description="What.")
    labels: dict[str, str] = pydantic.Field(default={}, description="Marks.")
    hot: bool = pydantic.Field(default=False, description="Whether.")


class Wheel(Section):
    """A wheel."""

    size: int = pydantic.Field(default=3, ge=1, description="How large.")


class Machine(Settings):
    """A machine."""

    foreign_sections: ClassVar[frozenset[str]] = frozenset({"cart"})
    engine: Engine = Engine()
    wheel: Wheel = Wheel()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "machine.yaml"


def read(file: Path, text: str, **environ: str) -> Loaded[Machine]:
    file.write_text(text)
    return load(Machine, path=file, environ=environ)


def problems(file: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        read(file, text, **environ)
    assert refused.value.reason == "SETTINGS_INVALID"
    return refused.value.message.replace(str(file), "FILE").splitlines()


def test_without_anything_there_are_the_defaults() -> None:
    loaded = load(Machine, path=None, environ={})

    assert loaded.settings == Machine()
    assert loaded.origins == {}


def test_flag_wins_over_environment_over_file_over_default(file: Path) -> None:
    file.write_text("engine: {address: '10.0.0.1:1', timeout: 1s, hot: yes}\n")

    loaded = load(
        Machine,
        path=file,
        environ={"HYPERVISOR_ENGINE__TIMEOUT": "2s", "HYPERVISOR_ENGINE__ADDRESS": "10.0.0.2:2"},
        overrides=["engine.timeout=3s"],
    )

    engine = loaded.settings.engine
    assert (engine.address, engine.timeout, engine.hot) == ("10.0.0.2:2", 3.0, True)
    assert loaded.origins == {
        "engine.address": "environment variable HYPERVISOR_ENGINE__ADDRESS",
        "engine.timeout": "--set engine.timeout",
        "engine.hot": f"{file}:1",
    }


def test_lists_and_maps_are_written_in_one_line_in_variables_and_flags() -> None:
    loaded = load(
        Machine,
        path=None,
        environ={"HYPERVISOR_ENGINE__FUELS": "oil, gas", "HYPERVISOR_ENGINE__LABELS": "a=1,b=2"},
        overrides=["engine.labels.c=3"],
    )

    assert loaded.settings.engine.fuels == ("oil", "gas")
    assert loaded.settings.engine.labels == {"a": "1", "b": "2", "c": "3"}


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError):
        Machine().engine.hot = True


def test_every_problem_is_told_at_once_with_its_place(file: Path) -> None:
    found = problems(
        file,
        "engine:\n  adress: 1.2.3.4:1\n  timeout: 5\nwheel:\n  size: 0\n",
        HYPERVISOR_ENGINE__HOT="warm",
        HYPERVISOR_WHEEL__SISE="4",
    )

    assert sorted(found) == [
        "FILE:2: engine.adress: is not a known key; did you mean engine.address?",
        "FILE:3: engine.timeout: give a duration with its unit (ms, s, m, h, d), such as 30s or 1h30m",
        "FILE:5: wheel.size: input should be greater than or equal to 1",
        "environment variable HYPERVISOR_ENGINE__HOT: engine.hot: input should be a valid boolean, "
        "unable to interpret input",
        "environment variable HYPERVISOR_WHEEL__SISE: wheel.sise: is not a known key; did you mean wheel.size?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("enigne: {}\nenigne2:\n  a: 1\n", "FILE:3: enigne2: is not a known key; did you mean engine?"),
        ("engine: 3\n", "FILE:1: engine: is a section: put its keys under it (engine.<key>)"),
        ("engine:\n  fuels: oil\n", "FILE:2: engine.fuels: give a list, such as [a, b]"),
        ("engine:\n  hot: yes\n  hot: no\n", "FILE:3: engine.hot: is given twice: remove one"),
        (
            "engine:\n  address: somewhere\n",
            "FILE:2: engine.address: give host:port, such as 127.0.0.1:50051",
        ),
        ("- a\n- b\n", "FILE:1: the file must hold sections with keys"),
        ("engine: [\n", "FILE:2: not valid YAML"),
        ("&a [*b]\n", "FILE:1: not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_remedy(file: Path, text: str, expected: str) -> None:
    assert problems(file, text)[0].startswith(expected)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml cannot be read: No such file"):
        load(Machine, path=tmp_path / "nowhere.yaml", environ={})


def test_an_empty_file_and_empty_sections_mean_defaults(file: Path) -> None:
    assert read(file, "").settings == Machine()
    assert read(file, "engine:\nwheel: {}\n").settings == Machine()


def test_variables_of_other_programs_are_left_alone() -> None:
    environ = {"HYPERVISOR_CART__SPEED": "1", "HYPERVISOR_CONTEXT": "prod", "PATH": "/bin"}

    assert load(Machine, path=None, environ=environ).settings == Machine()


def test_a_variable_of_a_section_that_is_nobodys_is_refused() -> None:
    with pytest.raises(SettingsError, match="did you mean engine"):
        load(Machine, path=None, environ={"HYPERVISOR_ENGIN__HOT": "yes"})


@pytest.mark.parametrize("flag", ["engine.hot", "engine=1", "=1", "engine.=1"])
def test_a_malformed_flag_is_refused(flag: str) -> None:
    with pytest.raises(SettingsError, match=r"write --set section\.key=value"):
        load(Machine, path=None, environ={}, overrides=[flag])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:0", ("::1", 0)),
        ("node-1.example:65535", ("node-1.example", 65535)),
    ],
)
def test_addresses_have_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", ":80", "::1:80", "host:", "host:x", "host:65536", "host:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"host:port|the port"):
        split_address(text)


def test_every_key_has_its_variable() -> None:
    assert list(known_keys(Machine)) == [
        "engine.address",
        "engine.timeout",
        "engine.fuels",
        "engine.labels",
        "engine.hot",
        "wheel.size",
    ]
    assert environment_name("engine.hot") == "HYPERVISOR_ENGINE__HOT"
