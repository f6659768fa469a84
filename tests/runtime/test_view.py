"""The live view: drawn off screen, and looked at as text."""

import io
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from relod.runtime.blocks import half_blocks, sparkline
from relod.runtime.screen import LiveView, PlainView
from relod.runtime.spans import Histogram
from relod.runtime.view import open_view, render, summary_line
from relod.runtime.viewstate import RunState, load_state, save_state

NS_PER_S = 10**9


def make_state(**changes: object) -> RunState:
    """A run an hour in."""
    act = Histogram()
    act.add_ms(np.linspace(1, 30, 100))
    image = np.zeros((120, 160, 3), np.uint8)
    image[:, 80:] = (0, 255, 0)
    values: dict[str, object] = {
        "task": "create-reacher",
        "mode": "local-only",
        "simulated": True,
        "phase": "running",
        "elapsed_s": 3725.0,
        "experience_s": 2400.0,
        "steps": 53211,
        "max_steps": 100000,
        "episodes": 60,
        "index": 231,
        "episode_steps": 666,
        "episode_return": -231.0,
        "returns": [-666.0] * 40 + [-100.0] * 20,
        "successes": [False] * 42 + [True] * 18,
        "image": image,
        "cycle_ms": 45.0,
        "act": act,
        "overruns": 3,
        "updates": 48123,
        "updates_per_s": 18.2,
        "policy_version": (1, 48100),
        "replay_steps": 5000,
        "replay_capacity": 100000,
        "losses": {"critic": 0.0213},
        "status": {"battery_mah": 2210.0, "battery_percent": 81.9, "mode": "safe", "bump": "", "attention": ""},
        "warnings": deque(["camera: opened again"], maxlen=8),
    }
    return RunState(**{**values, **changes})


def screen(state: RunState, width: int = 112, height: int = 30) -> list[str]:
    """The drawn lines without colours."""
    console = Console(width=width, height=height, file=io.StringIO(), record=True, color_system="truecolor")
    console.print(render(state, width, height))
    return console.export_text().splitlines()


def test_a_simulated_run_says_so_first():
    assert screen(make_state())[0].startswith(" SIMULATED")


def test_hardware_is_named_first_with_its_addresses():
    lines = screen(make_state(simulated=False, robot="/dev/ttyUSB0", camera="/dev/video0"))
    assert lines[0].startswith(" REAL ROBOT   /dev/ttyUSB0   camera /dev/video0")
    assert "SIMULATED" not in "".join(lines)


def test_an_alarm_takes_the_banner():
    assert screen(make_state(alarm="ROBOT MAY BE MOVING"))[0].startswith(" ROBOT MAY BE MOVING")


@pytest.mark.parametrize(
    "text",
    [
        "running",
        "231 of 666",
        "return -231",
        "53,211 of 100,000 steps",
        "40.0 min of experience",
        "1:02:05 in all",
        "battery 2210 mAh",
        "battery 81.9 %",
        "mode safe",
        "last 20: -100.0  ▲ 566.0   reached 18 of 20   best -100",
        "60 episodes",
        "updates 48,123",
        "policy 1.48100",
        "5,000 of 100,000",
        "critic 0.0213",
        "cycle 45 ms",
        "camera: opened again",
    ],
)
def test_the_screen_shows(text):
    assert text in "\n".join(screen(make_state()))


def test_timing_shows_percentiles_of_lateness_and_act():
    state = make_state()
    row = next(line for line in screen(state) if "│ act " in line)
    expected = state.act.summary_ms()
    assert row.split("│ act ")[1].split()[:3] == [f"{expected[name]:.2f}" for name in ("p50", "p99", "max")]


def test_real_time_is_marked_beside_the_cycle():
    assert "cycle 45 ms ─" in "\n".join(screen(make_state()))
    assert "cycle 45 ms · real-time ─" in "\n".join(screen(make_state(realtime=True)))
    assert summary_line(make_state(realtime=True)).endswith("3 overruns | real-time")


@pytest.mark.parametrize(("width", "height"), [(112, 30), (200, 60), (104, 20), (80, 24), (60, 12), (40, 5), (20, 1)])
@pytest.mark.parametrize("empty", [False, True])
def test_the_screen_never_outgrows_its_space(width, height, empty):
    state = RunState(task="t", mode="m", simulated=True) if empty else make_state()
    lines = screen(state, width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)


def test_what_a_person_must_do_is_seen_on_a_small_terminal_too():
    status = {"attention": "wheel drop left: put the robot on the floor"}
    lines = screen(make_state(status=status), 80, 24)
    assert any("put the robot on the floor" in line for line in lines[:6])
    assert "camera: opened again" in lines[-1]


def test_bump_and_other_empty_texts_take_no_room():
    assert "bump" not in "\n".join(screen(make_state()))


def test_drawing_is_cheap():
    """Four times a second beside a control process; about 3 ms on the machine it was written on."""
    state = make_state(image=np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8))
    console = Console(width=112, height=30, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    durations_s = []
    for _ in range(8):
        start_s = time.process_time()
        console.print(render(state, 112, 30))
        durations_s.append(time.process_time() - start_s)
    assert min(durations_s) < 0.02


# -- pictures and charts -----------------------------------------------------------------------------------------------


def test_half_blocks_show_two_pixels_each():
    image = np.zeros((4, 2, 3), np.uint8)
    image[0], image[1], image[3] = (0, 0, 255), (0, 255, 0), (255, 0, 0)  # rows: red, green, black, blue, in BGR
    lines = half_blocks(image, 2, 2)
    assert [[segment.text for segment in line] for line in lines] == [["▀▀"], ["▀▀"]]  # equal neighbours share one
    styles = [line[0].style for line in lines]
    assert [style.color.triplet.hex for style in styles] == ["#f80000", "#000000"]
    assert [style.bgcolor.triplet.hex for style in styles] == ["#00f800", "#0000f8"]


def test_half_blocks_average_what_they_shrink():
    image = np.zeros((120, 160, 3), np.uint8)
    image[::2] = 160
    (segment,) = half_blocks(image, 4, 2)[0]
    assert segment.style.color.triplet.hex == "#505050"


@pytest.mark.parametrize("shape", [(120, 160), (480, 640), (7, 5), (1, 1)])
def test_any_image_fills_the_cells(shape):
    lines = half_blocks(np.zeros((*shape, 3), np.uint8), 48, 18)
    assert [sum(segment.cell_length for segment in line) for line in lines] == [48] * 18


def test_a_sparkline_rises_from_left_to_right():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8, 1) == ["▁▂▃▄▅▆▇█"]
    assert sparkline([0, 1], 8, 2) == [" █", "▁█"]


def test_a_sparkline_averages_what_has_no_column():
    assert sparkline([0] * 50 + [8] * 50, 2, 1) == ["▁█"]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=50), st.integers(1, 20))
def test_a_sparkline_is_never_wider_than_its_columns(values, columns):
    rows = sparkline(values, columns, 3)
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 3
    assert len(rows[0]) <= columns


# -- the two views -----------------------------------------------------------------------------------------------------


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=112, height=30, color_system="truecolor")


def test_a_terminal_gets_the_live_view_and_a_pipe_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(open_view(terminal()), LiveView)
    assert isinstance(open_view(Console(file=io.StringIO())), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_view(terminal()), PlainView)


def test_the_live_view_draws_four_times_a_second_and_once_at_the_end():
    console, state = terminal(), make_state()
    with LiveView(console, render) as view:
        for tick in range(100):  # 1 s in steps of 10 ms
            state.steps = tick
            view.show(state, tick * NS_PER_S // 100)
        drawn = console.file.getvalue().count("SIMULATED")
        assert drawn == 4
        state.steps = 777777
    assert "777,777" in console.file.getvalue()


def test_the_plain_view_prints_a_line_every_ten_seconds_and_each_warning_once():
    console = Console(file=io.StringIO(), width=80)
    state = make_state()
    with open_view(console) as view:
        for second in range(31):
            view.show(state, second * NS_PER_S)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "warning: camera: opened again"
    assert len(lines) == 1 + 4
    assert set(lines[1:]) == {summary_line(state)}


def test_the_summary_line():
    assert summary_line(make_state()) == (
        "SIMULATED | 1:02:05 | running | 53211 steps | 60 episodes | return -100.0 and 18 reached in the last 20"
        " | 48123 updates | lateness p99 0.0 ms | 3 overruns"
    )
    assert summary_line(RunState(task="t", mode="m", simulated=False, robot="/dev/x")).startswith("REAL ROBOT /dev/x")


# -- saved states ------------------------------------------------------------------------------------------------------


def test_a_saved_state_is_drawn_as_it_was(tmp_path):
    state = make_state(image=np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8))
    save_state(state, tmp_path / "state.npz")
    assert screen(load_state(tmp_path / "state.npz")) == screen(state)
    save_state(RunState(task="t", mode="m", simulated=True), tmp_path / "empty.npz")
    assert load_state(tmp_path / "empty.npz").image is None


def test_the_picture_for_the_readme(tmp_path):
    save_state(make_state(), tmp_path / "state.npz")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "docs" / "make_picture.py"), "state.npz", "view.svg"]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PYTHONPATH": str(root)}, capture_output=True)
    picture = (tmp_path / "view.svg").read_text()
    assert "SIMULATED" in picture
    assert "create-reacher" in picture
