"""Tasks and algorithms by name: found lazily, and with an error for each way of not being found."""

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from relod.config import load
from relod.errors import SettingsError
from relod.robots import registry
from relod.robots.registry import TaskEntry


def test_the_create_task_is_built_in_and_its_settings_load():
    entry = registry.task("create")
    assert entry.robot == "create"
    assert entry.command_names == ("left_mm_s", "right_mm_s")
    assert entry.sensor_names[-1] == "connection_epoch"
    assert registry.load_attribute(entry.settings["task"], "the task settings") is entry.sections()["task"]


def test_every_target_of_the_create_task_exists():
    entry = registry.task("create")
    for target in (entry.driver, entry.emulator, entry.world):
        assert callable(registry.load_attribute(target, "a part of the task"))
    settings = load(entry.sections())
    assert entry.build(settings.task).spec.name == "create-reacher"
    for world, tree in registry.load_attribute(entry.worlds, "the worlds").items():
        assert load(entry.sections(), presets=[tree]).sim is not None, world


def test_the_driver_publishes_the_sensors_the_task_reads():
    entry = registry.task("create")
    assert registry.load_attribute(entry.driver, "the driver").sensor_names == entry.sensor_names


@pytest.mark.parametrize("name", ["sac"])
def test_algorithms_are_known_by_name(name):
    assert name in registry.names("algorithm")
    assert registry.target("algorithm", name) == "relod.algos.sac:SAC"


def test_names_lead_to_nothing_imported_until_they_are_chosen():
    code = "import sys, relod.robots.registry as r; r.names('algorithm'); print({'torch', 'cv2'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_misspelt_name_gets_the_nearest_and_the_list():
    with pytest.raises(SettingsError, match=r"unknown task 'craete'; did you mean create\? known: create"):
        registry.task("craete")


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(SettingsError, match=r"unknown algorithm 'xyz123'; known: .*sac"):
        registry.algorithm("xyz123")


def test_a_task_that_is_no_entry_is_refused():
    with pytest.raises(SettingsError, match="TaskEntry"):
        registry.task("relod.robots.registry:TASKS")


def test_settings_that_are_no_section_are_refused():
    entry = TaskEntry(
        robot="r",
        settings={"task": "builtins:int"},
        build=lambda settings: settings,
        driver="",
        commissioning="",
        emulator="",
        world="",
        worlds="",
        sensor_names=(),
        command_names=(),
    )
    with pytest.raises(SettingsError, match="not a section of settings"):
        entry.sections()


def test_entry_points_add_names_but_never_replace_one(monkeypatch):
    group = "relod.tasks"
    points = EntryPoints(
        [
            EntryPoint(name="plugin", value="some_package:ENTRY", group=group),
            EntryPoint(name="create", value="evil:ENTRY", group=group),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    assert registry.target("task", "plugin") == "some_package:ENTRY"
    assert registry.target("task", "create") == registry.TASKS["create"]
    assert registry.names("task")["create"] == registry.TASKS["create"]
