"""The learner's screen and its lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from relod.runtime.clock import NS_PER_S
from relod.runtime.remote.learnerview import LearnerState, RobotRow, open_learner_view, render, summary_line


def row(name: str = "create-1", **fields: object) -> RobotRow:
    values: dict[str, object] = {"state": "up", "acts": "robot", "steps": 1234, "steps_per_s": 22.2, "episodes": 7}
    return RobotRow(name=name, **{**values, **fields})


def full_state(robots: int = 3) -> LearnerState:
    state = LearnerState(
        address="ws://192.168.1.5:8765",
        phase="learning",
        task="create-reacher",
        algorithm="sac",
        preset="sac-lite",
        folder="runs/2026-01-01T00-00-00Z-learner-create-reacher-s0",
        elapsed_s=3725.0,
        experience_s=1800.0,
        steps=40_000,
        max_steps=100_000,
        episodes=300,
        returns=[-400.0 + number for number in range(300)],
        updates=12_345,
        updates_per_s=31.5,
        policy_version=(2, 12_300),
        replay_steps=25_000,
        replay_capacity=50_000,
        losses={"critic": 0.0123},
    )
    state.robots = [
        row(f"create-{number}", mean_return=-42.5, backlog=3, in_bytes_per_s=1.85e6, policy_age_s=1.2)
        for number in range(1, robots + 1)
    ]
    return state


def text_of(state: LearnerState, width: int = 120, height: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(render(state, width, height))
    return console.file.getvalue().splitlines()


def test_it_shows_the_run_and_every_robot():
    text = "\n".join(text_of(full_state()))
    for part in (
        *("ws://192.168.1.5:8765", "create-reacher", "learning", "sac-lite", "12,345", "31.5", "2.12300"),
        *("25,000 of 50,000", "critic 0.0123", "3 of 3 connected", "40,000 of 100,000 steps", "1:02:05"),
        *("create-1", "create-3", "1,234", "22.2", "-42.5", "1.85", "1.2 s", "300 episodes"),
    ):
        assert part in text


def test_what_a_robot_lacks_is_told():
    state = full_state(0)
    state.robots = [row("a", state="away"), row("b", acts="learner"), row("c", rtt_ms=1.25)]
    away, asks, near = (line for line in text_of(state) if line.startswith(("│ a ", "│ b ", "│ c ")))
    assert "away" in away
    assert "acts here" in asks
    assert "1.2" in near
    assert "1 of 3" not in "\n".join(text_of(state))
    assert "2 of 3 connected" in "\n".join(text_of(state))


def test_before_the_first_robot_it_says_so():
    text = "\n".join(text_of(LearnerState(address="ws://h:1", phase="waiting")))
    assert "none has come yet" in text
    assert "no task yet" in text


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (60, 12), (30, 5), (200, 60)])
@pytest.mark.parametrize("robots", [0, 1, 40])
def test_it_keeps_to_its_space(width, height, robots):
    state = full_state(robots)
    state.warnings.extend(f"warning {number} {'x' * 100}" for number in range(6))
    lines = text_of(state, width, height)
    assert len(lines) <= height
    assert all(len(line) == width for line in lines)


def test_robots_that_have_no_room_are_counted():
    text = "\n".join(text_of(full_state(40), height=24))
    shown = sum(f"create-{number} " in text for number in range(1, 41))
    assert 0 < shown < 40
    assert f"and {40 - shown} more" in text


def test_long_names_are_cut():
    state = full_state(0)
    state.robots = [row("n" * 64)]
    assert "n" * 15 + "…" in "\n".join(text_of(state))


def test_a_line_says_how_it_goes():
    state = full_state()
    state.robots = [*state.robots, row("lost", state="away")]
    line = summary_line(state)
    assert "3 of 4 robots" in line
    assert "return -110.5 in the last 20" in line
    assert line.endswith("lost away")


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_each_warning_once():
    out = io.StringIO()
    state = full_state()
    with open_learner_view(Console(file=out, width=200)) as view:
        for tenth in range(250):
            if tenth == 30:
                state.warnings.append("create-1 left: silent")
            view.show(state, tenth * NS_PER_S // 10)
    lines = out.getvalue().splitlines()
    assert sum("learner learning" in line for line in lines) == 3
    assert sum("create-1 left: silent" in line for line in lines) == 1


def test_on_a_terminal_the_last_state_stays():
    out = io.StringIO()
    console = Console(file=out, width=120, height=40, force_terminal=True, _environ={"TERM": "xterm"})
    state = full_state()
    with open_learner_view(console) as view:
        view.show(state, 0)
        state.phase = "ended"
        view.show(state, 1)
    assert "ended" in out.getvalue()
