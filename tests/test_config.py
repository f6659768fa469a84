"""Settings: which source wins, what is refused and how it is said, and that a saved file gives the same settings."""

from __future__ import annotations

import math
import tomllib
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from relod.config import RunSettings, Section, Settings, describe, load, to_dict, to_toml
from relod.errors import EXIT_SETTINGS, EXIT_START, SettingsError, StartError


class Inner(Section, frozen=True):
    gain: Annotated[float, Meta(ge=0, le=10, description="of the loop")] = 1.0
    name: str = "inner"


class Arm(Section, frozen=True):
    """A section with every kind of value."""

    count: Annotated[int, Meta(ge=1, description="of joints")] = 6
    speed: Annotated[float, Meta(gt=0, description="of the tool, in m/s")] = 0.5
    on: bool = True
    kind: Annotated[Literal["soft", "hard"], Meta(description="of grip")] = "soft"
    label: str = ""
    widths: tuple[int, ...] = (1, 2)
    colour: Annotated[tuple[int, int, int], Meta(description="blue, green, red")] = (0, 0, 0)
    words: tuple[str, ...] = ()
    inner: Inner = Inner()


class Agent(Section, frozen=True):
    batch_size: Annotated[int, Meta(ge=1)] = 64
    hidden: tuple[int, ...] = (512, 512)


SECTIONS: dict[str, type[Section]] = {"task": Arm, "agent": Agent}


def loaded(**sources: Any) -> Settings:
    return load(SECTIONS, **sources)


def toml(tmp_path, text: str):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def refused(**sources: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        loaded(**sources)
    assert caught.value.exit_code == EXIT_SETTINGS
    assert "\n" not in str(caught.value)
    return caught.value


# -- sources -----------------------------------------------------------------------------------------------------------


def test_without_any_source_the_defaults_hold():
    settings = loaded()
    assert settings.task == Arm()
    assert settings.run == RunSettings()
    assert settings.robot == Section()


def test_later_sources_win(tmp_path):
    sources: dict[str, Any] = {
        "presets": [{"task": {"count": 1, "speed": 1.0}}, {"task": {"count": 2}}],
        "file": toml(tmp_path, "[task]\ncount = 3\n"),
        "environment": {"RELOD_TASK__COUNT": "4"},
        "assignments": ["task.count=5", "task.count = 6"],
        "overrides": {"task.count": 7},
    }
    expected = {"presets": 2, "file": 3, "environment": 4, "assignments": 6, "overrides": 7}
    given_so_far: dict[str, Any] = {}
    for name, value in sources.items():
        given_so_far[name] = value
        settings = loaded(**given_so_far)
        assert settings.task.count == expected[name]
        assert settings.task.speed == 1.0  # what no later source names stays


def test_nested_sections_are_reached_from_every_source(tmp_path):
    assert loaded(presets=[{"task": {"inner": {"gain": 2.0}}}]).task.inner.gain == 2.0
    assert loaded(file=toml(tmp_path, "[task.inner]\ngain = 3\n")).task.inner == Inner(gain=3.0)
    assert loaded(environment={"RELOD_TASK__INNER__GAIN": "4"}).task.inner.gain == 4.0
    both = loaded(file=toml(tmp_path, '[task.inner]\nname = "x"\n'), assignments=["task.inner.gain=5"])
    assert both.task.inner == Inner(gain=5.0, name="x")


def test_only_variables_of_the_form_relod_section_name_count():
    environment = {"RELOD_DEBUG": "1", "PATH": "/bin", "OTHER_RUN__SEED": "3", "RELOD_RUN__SEED": "9"}
    assert loaded(environment=environment).run.seed == 9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("widths=[3, 4, 5]", (3, 4, 5)),
        ("widths=[]", ()),
        ("words=['a', \"b\"]", ("a", "b")),
        ("colour=[1,2,3]", (1, 2, 3)),
        ("on=false", False),
        ("on=1", True),
        ("count=12", 12),
        ("speed=2", 2.0),
        ("speed=1e-3", 0.001),
        ("kind=hard", "hard"),
        ("label=a=b", "a=b"),
        ("label=[not a list]", "[not a list]"),
        ("label=", ""),
    ],
)
def test_texts_become_values_of_the_settings_type(text, value):
    name = text.partition("=")[0]
    assert getattr(loaded(assignments=[f"task.{text}"]).task, name) == value
    variable = {f"RELOD_TASK__{name.upper()}": text.partition("=")[2]}
    assert getattr(loaded(environment=variable).task, name) == value


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("task.cuont=1", "task.count"),
        ("count=1", "task.count"),
        ("agent.speed=1", "task.speed"),
        ("agent.batchsize=1", "agent.batch_size"),
        ("taks.count=1", "task.count"),
        ("task.inner.gian=1", "task.inner.gain"),
        ("gain=1", "task.inner.gain"),
        ("run.sed=1", "run.seed"),
        ("task.count.more=1", "task.count"),
    ],
)
def test_an_unknown_setting_is_refused_with_what_was_probably_meant(wrong, meant):
    error = refused(assignments=[wrong])
    assert repr(wrong.partition("=")[0]) in error.message
    assert f"did you mean {meant}?" == error.hint


def test_an_unknown_setting_like_no_other_points_to_the_list():
    assert "relod settings" in refused(assignments=["xyzzy.plugh=1"]).hint


@pytest.mark.parametrize("name", ["task", "task.inner"])
def test_a_section_is_no_setting_and_the_hint_says_so(name):
    error = refused(assignments=[f"{name}=3"])
    assert f"{name} is a section" in error.hint
    assert "task." in error.hint


def test_an_unknown_section_of_a_file_is_refused(tmp_path):
    error = refused(file=toml(tmp_path, "[tsk]\nx = 1\n"))
    assert "'tsk'" in error.message
    assert str(tmp_path / "settings.toml") in error.message
    assert error.hint == "did you mean task?"
    assert "'task.wrist'" in refused(file=toml(tmp_path, "[task.wrist]\nx = 1\n")).message


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("task.count=0", ">= 1"),
        ("task.count=1.5", "int"),
        ("task.count=many", "int"),
        ("task.speed=0", "> 0"),
        ("task.speed=nan", "> 0"),
        ("task.inner.gain=10.1", "<= 10"),
        ("task.inner.gain=inf", "<= 10"),
        ("task.on=maybe", "bool"),
        ("task.kind=medium", "soft | hard"),
        ("task.colour=[1,2]", "[int, int, int]"),
        ("task.widths=3", "[int, ...]"),
        ("task.widths=[1, x]", "[int, ...]"),
        ("safety.max_sensor_age_ms=nan", "> 0"),
        ("safety.command_timeout_ms=5000", "<= 1000"),
        ("run.seed=-1", ">= 0"),
        ("learner.update_every_steps=-1", ">= 0"),
        ("learner.update_every_steps=inf", "<= 1e+06"),
        ("learner.max_updates_per_s=nan", ">= 0"),
        ("replay.memory_mib=-1", ">= 0"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_type_and_bounds(assignment, told):
    error = refused(assignments=[assignment])
    name, _, value = assignment.partition("=")
    assert error.message.startswith(f"{name} = ")
    assert value in error.message
    assert told in error.hint
    assert name in error.hint


def test_an_assignment_without_a_value_is_refused():
    assert "'='" in refused(assignments=["task.count"]).message


def test_a_variable_that_names_nothing_is_refused_by_its_name():
    assert "RELOD_TASK__CUONT" in refused(environment={"RELOD_TASK__CUONT": "1"}).message


def test_a_file_that_cannot_be_read_is_an_error_of_the_start(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(StartError, match=str(path)) as caught:
            loaded(file=path)
        assert caught.value.exit_code == EXIT_START


@pytest.mark.parametrize("text", ["count == 3", "[task", "a = 1\na = 2", "\x00"])
def test_a_file_that_is_not_toml_is_refused(tmp_path, text):
    assert "is not TOML" in refused(file=toml(tmp_path, text)).message


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not TOML" in refused(file=path).message


def test_a_value_in_the_place_of_a_section_is_refused(tmp_path):
    assert "task is a section" in refused(file=toml(tmp_path, "task = 3\n")).hint


# -- saved and told ----------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**62), 2**62)
arms = st.builds(
    Arm,
    count=st.integers(1, 2**62),
    speed=st.floats(min_value=0, exclude_min=True),
    on=st.booleans(),
    kind=st.sampled_from(["soft", "hard"]),
    label=texts,
    widths=st.lists(numbers, max_size=4).map(tuple),
    colour=st.tuples(numbers, numbers, numbers),
    words=st.lists(texts, max_size=3).map(tuple),
    inner=st.builds(Inner, gain=st.floats(0, 10), name=texts),
)


@given(arm=arms, seed=st.integers(0, 2**62), folder=texts)
def test_a_saved_file_loads_to_the_same_settings(tmp_path_factory, arm, seed, folder):
    settings = Settings(run=RunSettings(seed=seed, folder=folder), task=arm, agent=Agent())
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    assert loaded(file=path) == settings


def test_the_saved_file_is_plain_toml_with_a_table_per_section():
    tree = tomllib.loads(to_toml(loaded()))
    assert tree["task"]["inner"] == {"gain": 1.0, "name": "inner"}
    assert tree["task"]["widths"] == [1, 2]
    assert "robot" not in tree  # nothing to say about it


def test_describe_lists_every_setting_once_with_its_default_and_meaning():
    rows = list(describe(SECTIONS))
    names = [name for name, _, _ in rows]
    assert len(names) == len(set(names))

    def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
        return [
            name
            for key, value in tree.items()
            for name in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
        ]

    assert sorted(names) == sorted(leaves(to_dict(loaded())))
    told = {name: (default, text) for name, default, text in rows}
    assert told["task.count"] == (6, "int, >= 1: of joints")
    assert told["task.kind"] == ("soft", "soft | hard: of grip")
    assert told["task.inner.gain"] == (1.0, "float, >= 0, <= 10: of the loop")


def test_every_setting_of_the_runtime_says_what_it_means():
    for name, default, text in describe({}):
        assert ": " in text, name
        if isinstance(default, float):
            assert math.isfinite(default)


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        loaded().run.seed = 3  # type: ignore[misc]
