"""Resolving a request: names, presets, hardware or simulation, and what a plan says of itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from relod.algos.sac import SacSettings
from relod.errors import EXIT_SETTINGS, SettingsError
from relod.robots.create2.reacher import CreateReacher
from relod.runtime.modes import MODES, describe_modes, describe_settings, resolve
from relod.runtime.remote.wire import Challenge
from relod.runtime.request import Request, choose_preset
from tests.fakes import small_request


def plan(**fields):
    return resolve(small_request(Path("runs"), **{"clock": "wall", **fields}))


def refused(**fields) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        plan(**fields)
    assert caught.value.exit_code == EXIT_SETTINGS
    assert "\n" not in str(caught.value)
    return caught.value


def test_names_lead_to_what_they_stand_for():
    found = plan()
    assert isinstance(found.task, CreateReacher)
    assert isinstance(found.settings.agent, SacSettings)
    assert (found.task_name, found.algorithm_name) == ("create", "sac")
    assert found.algorithm_target == "relod.algos.sac:SAC"
    assert found.task.spec.camera_hw == (24, 32)  # the task is built with the resolved settings


@pytest.mark.parametrize(
    ("field", "wrong", "meant"),
    [
        ("task", "creat", "create"),
        ("mode", "local", "local-only"),
        ("algorithm", "sac2", "sac"),
        ("preset", "sac-light", "sac-lite"),
        ("preset", "papr", "paper"),
        ("world", "harch", "harsh"),
        ("clock", "vrtual", "virtual"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_that_are_known(field, wrong, meant):
    error = refused(**{field: wrong})
    assert f"unknown {field} {wrong!r}" in error.message
    assert f"did you mean {meant}?" in error.hint
    assert "known: " in error.hint


def test_a_name_like_no_other_is_answered_with_all_that_are_known():
    assert refused(world="xxxxx").hint == "known: ideal, nominal, harsh"


@pytest.mark.parametrize("preset", ["sac", "sac-lite", "paper"])
def test_presets_by_name(preset):
    found = plan(preset=preset, assignments=())
    assert (found.preset, found.preset_reason) == (preset, "asked for")
    assert found.settings.agent.batch_size == {"sac": 256, "sac-lite": 64, "paper": 256}[preset]
    assert found.settings.agent.augment == ("crop" if preset == "paper" else "shift")


def test_without_a_name_the_machine_decides_and_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = plan(preset=None)
    assert (found.preset, found.preset_reason) == ("sac-lite", "this machine has no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card X")
    found = plan(preset=None)
    assert (found.preset, found.preset_reason) == ("sac", "this machine has Card X")


def test_an_algorithm_with_one_preset_has_it_everywhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_preset(None, {"ppo": {}})[0] == "ppo"


def test_settings_override_the_preset_and_the_world():
    found = plan(preset="paper", world="harsh", assignments=("agent.gamma=0.9", "sim.camera.drop=0.5"))
    assert (found.settings.agent.gamma, found.settings.agent.n_step) == (0.9, 1)
    assert (found.settings.sim.camera.drop, found.settings.sim.camera.latency_ms) == (0.5, 100.0)


def ur5(**fields) -> Request:
    return Request(**{"task": "ur5", "environment": {}, "overrides": {}, **fields})


def test_a_tasks_own_profile_goes_over_the_preset():
    assert resolve(ur5()).settings.task.max_speed_rad_s == 0.7
    assert resolve(ur5(profile="upstream")).settings.task.max_speed_rad_s == 0.3
    with pytest.raises(SettingsError, match=r"unknown profile 'upstrem'.* did you mean upstream"):
        resolve(ur5(profile="upstrem"))


def test_with_a_learner_elsewhere_a_profile_is_the_tasks_own_or_the_learners():
    there = {"mode": "remote-local", "learner": "ws://127.0.0.1:8765"}
    assert resolve(ur5(profile="upstream", **there)).settings.task.max_speed_rad_s == 0.3
    with pytest.raises(SettingsError, match=r"--profile laptop with --mode remote-local: .* are the learner's"):
        resolve(ur5(profile="laptop", **there))


@pytest.mark.parametrize(("asked", "target"), [(None, ""), ("ppo", "relod.algos.ppo:PPO")])
def test_a_robot_takes_the_learners_algorithm_unless_it_is_told_one(asked, target):
    there = {"mode": "remote-local", "learner": "ws://127.0.0.1:8765"}
    found = resolve(ur5(algorithm=asked, **there))
    assert (found.algorithm_name, found.algorithm_target) == (asked or "", target)


@pytest.mark.parametrize(
    ("task", "preset", "seen"),
    [
        ("create", "sac-lite", (48, 64)),
        ("ur5", "sac-lite", (45, 80)),
        ("ur5", "", (48, 64)),
        ("ur5", "paper", (48, 64)),
    ],
)
def test_images_suit_the_learner_elsewhere_and_the_task(task, preset, seen):
    greeting = Challenge(protocol=1, relod="1", nonce=bytes(16), token=False, image_hw=(48, 64), preset=preset)
    there = {"task": task, "mode": "remote-local", "learner": "ws://127.0.0.1:8765"}
    assert resolve(ur5(**there), greeting).task.spec.image_hw == seen
    asked_for = resolve(ur5(assignments=("task.image_height=30",), **there), greeting)
    assert asked_for.task.spec.image_hw[0] == 30


@pytest.mark.parametrize(
    ("steps", "minutes", "limit"), [(0, 0.0, 0), (500, 0.0, 500), (0, 0.45, 600), (500, 0.45, 500), (700, 0.45, 600)]
)
def test_a_run_ends_by_steps_or_by_minutes_of_experience(steps, minutes, limit):
    assert plan(overrides={"run.steps": steps, "run.minutes": minutes}).max_steps == limit


# -- hardware or simulation --------------------------------------------------------------------------------------------


def test_with_no_robot_named_the_world_is_simulated():
    for camera in (None, "sim"):
        found = plan(camera=camera)
        assert (found.robot, found.camera, found.simulated, found.device_text) == (None, None, True, "SIMULATED")


def test_hardware_is_named_in_full():
    found = plan(robot="/dev/ttyUSB0", camera="0")
    assert not found.simulated
    assert found.device_text == "robot /dev/ttyUSB0, camera 0"


@pytest.mark.parametrize(("robot", "camera"), [("/dev/ttyUSB0", "sim"), (None, "0")])
def test_a_mixture_must_be_asked_for(robot, camera):
    error = refused(robot=robot, camera=camera)
    assert "mixed" in error.message
    assert "SIMULATED" in error.message
    assert "--allow-mixed" in error.hint
    found = plan(robot=robot, camera=camera, allow_mixed=True)
    assert "SIMULATED" in found.device_text
    assert found.simulated == (robot is None)


def test_a_robot_without_a_camera_is_refused():
    error = refused(robot="/dev/ttyUSB0")
    assert "without --camera" in error.message
    assert "--camera 0" in error.hint


def test_virtual_time_has_no_hardware():
    assert "--clock virtual" in refused(clock="virtual", robot="/dev/ttyUSB0", camera="0").message
    assert "--clock virtual" in refused(clock="virtual", camera="0").message


def test_virtual_time_is_not_recorded():
    assert "not recorded" in refused(clock="virtual", overrides={"run.record": True}).message
    assert plan(overrides={"run.record": True}).settings.run.record


def test_a_camera_that_is_none_is_refused_before_anything_starts():
    assert "'webcam' is no camera" in refused(robot="/dev/ttyUSB0", camera="webcam").message


# -- what is told ------------------------------------------------------------------------------------------------------


def test_every_mode_says_who_acts_and_who_learns():
    table = describe_modes()
    assert [row["mode"] for row in table] == list(MODES)
    assert all(row["acts"] and row["learns"] for row in table)


def test_every_setting_of_task_and_algorithm_is_listed():
    names = [name for name, _, _ in describe_settings("create", "sac")]
    assert {"run.seed", "task.cycle_ms", "sim.camera.fps", "robot.baud", "agent.batch_size"} <= {*names}
    assert len(names) == len(set(names))


def test_a_task_can_be_built_again_in_another_process():
    builder = pickle.loads(pickle.dumps(plan().task_builder))  # noqa: S301  our own bytes
    assert builder().spec == plan().task.spec
