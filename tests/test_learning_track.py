"""SAC learns the task `track` from pixels: a whole run in virtual time, with small pictures and networks."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from relod import cli
from relod.algos.sac import SAC
from relod.config import load
from relod.robots.track.task import TRACK

SMALL = (
    *("task.camera_height=24", "task.camera_width=32", "task.image_height=24", "task.image_width=32"),
    *("agent.conv_channels=16", "agent.conv_strides=[2,1]", "agent.shift_px=1", "agent.hidden=[128,128]"),
    *("agent.gamma=0.97", "agent.init_steps=300", "agent.init_hold=5", "agent.max_updates_per_step=1"),
    *("agent.actor_lr=1e-3", "agent.critic_lr=1e-3", "agent.alpha_lr=1e-3"),
    *("replay.capacity=4096", "learner.threads=1"),
)


@pytest.mark.parametrize("name", list(TRACK.presets))
def test_what_the_task_changes_in_a_preset_is_a_setting_of_the_agent(name: str) -> None:
    sections = {**TRACK.sections(), "agent": SAC.settings_type}
    changed = load(sections, presets=[SAC.presets[name], TRACK.presets[name]]).agent
    assert changed != load(sections, presets=[SAC.presets[name]]).agent


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sac_learns_to_track(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["robot", "--task", "track", "--clock", "virtual", "--preset", "sac-lite", "--seed", "0", "--json"]
    for assignment in (*SMALL, f"run.folder={tmp_path}"):
        arguments += ["--set", assignment]
    assert cli.run([*arguments, "--steps", "3000"]) == 0
    returns = json.loads(capsys.readouterr().out)["returns"]
    untrained, learned = statistics.mean(returns[:3]), statistics.median(returns[-5:])
    # Seeds 0 to 2 begin between -1 and 4 and end between 78 and 80; standing still gets 7, a scripted controller 86.
    assert learned > untrained + 35, [round(value) for value in returns]
