"""Whole runs as a user starts them: the main job, every kind of death, hardware that fails, a recording."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from relod.runtime.checkpoint import newest_readable
from relod.runtime.log.reader import LogReader
from relod.runtime.scheduling import PRIORITIES, Permitted, refusal
from relod.types import Step
from tests.commands import emulator, relod, robot, stood_after_ms

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

# The project's limit is 300 ms, shown by benchmarks/stopping.py on 30 moments each; a busy machine may add to it.
STOP_LIMIT_MS = 450.0

KEYS = {
    "steps",
    "episodes",
    "returns",
    "updates",
    "overruns",
    "cycle_lateness_ms",
    "act_ms",
    "sensor_age_ms",
    "frame_age_ms",
    "policy_version",
    "replay_steps",
    "run_dir",
    "simulated",
    "stopped_cleanly",
}


def test_main_job(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with robot(tmp_path, "--steps", "150") as run:
        assert run.wait() == 0, run.messages()
        result = run.result()
        assert result.keys() >= KEYS
        assert (result["steps"], result["replay_steps"], result["simulated"]) == (150, 150, True)
        assert result["updates"] > 0
        assert result["policy_version"][1] > 0, "no policy of the learner ever acted"
        assert result["stopped_cleanly"] is True
        assert set(result["act_ms"]) == {"p50", "p90", "p99", "p999", "max"}
        folder = tmp_path / result["run_dir"]
        for name in ("settings.toml", "run.json", "metrics.jsonl", "episodes.jsonl", "spans.bin"):
            assert (folder / name).stat().st_size > 0, name
        assert list((folder / "checkpoints").glob("*.safetensors"))
    assert set(os.listdir("/dev/shm")) <= before, "shared memory was left behind"


def test_real_time_or_one_line_that_says_what_is_not_permitted(tmp_path: Path) -> None:
    with robot(tmp_path, "--steps", "60", "--realtime") as run:
        code = run.wait()
        if lacking := refusal(Permitted.here()):
            assert (code, run.messages().count("\n")) == (3, 1)
            assert f"--realtime is not permitted here: {lacking}" in run.messages()
            return
        assert code == 0, run.messages()
        result = run.result()
    on_the_path = ("guard", "device", "control", "sentinel")
    found = result["realtime"]["processes"]
    assert {name: found[name] for name in on_the_path} == {
        name: {"policy": "SCHED_FIFO", "priority": PRIORITIES[name], "memory_locked": True} for name in on_the_path
    }
    assert {found[name]["policy"] for name in ("camera", "world")} == {"SCHED_OTHER"}
    assert found["worker"]["policy"] == "SCHED_IDLE"
    assert result["stopped_cleanly"] is True
    assert json.loads((tmp_path / result["run_dir"] / "run.json").read_text())["realtime"]["asked"] is True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_the_robot_standing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with (
        emulator(tmp_path) as world,
        robot(tmp_path, "--robot", world.port, "--camera", world.camera_url) as run,
    ):
        run.wait_for_steps(20)
        sent_ns = time.monotonic_ns()
        run.process.send_signal(number)
        assert run.wait() == code, run.messages()
        result = run.result()
        assert result["stopped_cleanly"] is True
        assert result["simulated"] is False
        assert stood_after_ms(world.stop(), sent_ns) < STOP_LIMIT_MS


@pytest.mark.parametrize("victims", [("parent",), ("control",), ("device",), ("parent", "control")])
def test_killed_processes_leave_the_robot_standing(tmp_path: Path, victims: tuple[str, ...]) -> None:
    with (
        emulator(tmp_path) as world,
        # A device process that is started again would soon drive on, so this one may not be.
        robot(tmp_path, "--robot", world.port, "--camera", world.camera_url, "--set", "safety.max_restarts=0") as run,
    ):
        run.wait_for_steps(20)
        pids = [run.process.pid if name == "parent" else run.pid_of(name) for name in victims]
        killed_ns = time.monotonic_ns()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        code = run.wait()
        if "parent" not in victims:
            assert code == 4, run.messages()
            assert f"{victims[0]} process was killed by SIGKILL" in run.messages()
        time.sleep(0.5)
        assert stood_after_ms(world.stop(), killed_ns) < STOP_LIMIT_MS


def test_camera_worker_and_device_are_replaced(tmp_path: Path) -> None:
    with robot(tmp_path, "--steps", "600") as run:
        run.wait_for_steps(30)
        for name in ("worker", "camera", "device"):
            os.kill(run.pid_of(name), signal.SIGKILL)
            time.sleep(1.0)
        assert run.wait(120) == 0, run.messages()
        result = run.result()
        assert result["restarts"] == {"worker": 1, "camera": 1, "device": 1}
        assert result["steps"] == result["replay_steps"] == 600
        assert result["policy_version"][0] == 2, "the second worker's policies have a higher epoch"


def test_cable_comes_back_or_the_run_ends(tmp_path: Path) -> None:
    link = tmp_path / "robot"
    with (
        emulator(tmp_path, "--link", str(link)) as world,
        robot(tmp_path, "--robot", str(link), "--camera", world.camera_url, "--set", "robot.reopen_limit_s=3") as run,
    ):
        run.wait_for_steps(20)
        world.ask("hang_up", seconds=1.0)
        time.sleep(3.0)
        steps = run.steps()
        run.wait_for_steps(steps + 30)
        world.ask("hang_up", seconds=60.0)
        assert run.wait() == 4, run.messages()
        assert "ROBOT MAY BE MOVING" in run.messages() or "the robot stood" in run.messages()


def test_camera_that_stays_away_ends_the_run(tmp_path: Path) -> None:
    with (
        emulator(tmp_path) as world,
        robot(
            tmp_path,
            *("--robot", world.port, "--camera", world.camera_url),
            *("--set", "safety.stall_limit_s=2"),
        ) as run,
    ):
        run.wait_for_steps(20)
        world.ask("camera_unplug", seconds=60.0)
        assert run.wait() == 4, run.messages()
        assert "no camera image for 2 s" in run.messages()
        assert run.result()["stopped_cleanly"] is True


def test_recorded_run_replays_identically(tmp_path: Path) -> None:
    with robot(tmp_path, "--steps", "200", "--record") as run:
        assert run.wait() == 0, run.messages()
        folder = run.result()["run_dir"]
    done = relod(tmp_path, "replay", folder)
    assert done.returncode == 0, done.stderr
    assert "200 steps" in done.stderr
    assert "identical" in done.stderr


def test_hardware_that_is_not_there(tmp_path: Path) -> None:
    with robot(tmp_path, "--robot", "/dev/ttyNONE", "--camera", "0") as run:
        assert run.wait() == 3
        line = run.messages().splitlines()[-1]
        assert "/dev/ttyNONE" in line or "/dev/video0" in line  # whichever is found to be missing first


def test_port_that_is_busy_silent_or_at_another_speed(tmp_path: Path) -> None:
    import serial

    with emulator(tmp_path) as world:
        arguments = ("--robot", world.port, "--camera", world.camera_url)
        with serial.Serial(world.port, exclusive=True), robot(tmp_path, *arguments) as run:
            assert run.wait() == 3
            assert "busy" in run.messages().splitlines()[-1]
        with robot(tmp_path, *arguments, "--set", "robot.baud=57600") as run:
            assert run.wait() == 3
            assert "baud" in run.messages().splitlines()[-1]
        world.ask("freeze", seconds=60.0)
        with robot(tmp_path, *arguments) as run:
            assert run.wait() == 3
            assert world.port in run.messages().splitlines()[-1]


def test_camera_that_is_not_there(tmp_path: Path) -> None:
    with emulator(tmp_path) as world:
        for source in ("/dev/video97", "http://127.0.0.1:9/"):
            with robot(tmp_path, "--robot", world.port, "--camera", source) as run:
                assert run.wait() == 3
                assert source in run.messages().splitlines()[-1]


def test_full_disk_stops_the_run(tmp_path: Path) -> None:
    with robot(tmp_path, "--steps", "100000") as run:
        run.wait_for_steps(20)
        # The largest file of this process may not grow any more: the kernel refuses as on a full disk (EFBIG).
        size = (run.folder / "latest" / "spans.bin").stat().st_size
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size + 1, resource.RLIM_INFINITY))
        assert run.wait(60) == 4, run.messages()
        assert "the disk is full" in run.messages().splitlines()[-1]
        assert run.result()["stopped_cleanly"] is True
        folder = (run.folder / "latest").resolve()
    steps = LogReader(folder / "log").summary().last_env_step
    done = relod(tmp_path, "robot", "--json", "--resume", str(folder), "--steps", str(steps + 30))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == steps + 30


def test_killed_altogether_and_resumed(tmp_path: Path) -> None:
    frequent = ("--set", "learner.checkpoint_every_s=1")
    with robot(tmp_path, "--seed", "4", *frequent) as run:
        run.wait_for_steps(150)
        run.wait_for_checkpoint()
        folder = (run.folder / "latest").resolve()
    steps = LogReader(folder / "log").summary().last_env_step
    before = newest_readable(folder / "checkpoints").checkpoint
    assert before is not None
    assert steps >= 150
    done = relod(tmp_path, "robot", "--json", "--resume", str(folder), "--steps", str(steps + 100))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run_dir"] == str(folder)
    assert result["steps"] == steps + 100
    assert result["stopped_cleanly"]
    assert result["updates"] >= before.counters["updates"]
    assert result["policy_version"][0] > before.counters["epoch"]
    reader = LogReader(folder / "log")
    messages = [record.message for record in reader.iterate()]
    taken = [message for message in messages if isinstance(message, Step)]
    after = taken[steps:]
    # From its first cycle on the robot acts by the policy it had, later by newer ones: nothing fresh, nothing random.
    epoch = before.counters["epoch"]
    assert {step.policy_version[0] for step in after} <= {epoch, epoch + 1}
    assert after[0].policy_version[1] == before.counters["published"]
    assert after[0].episode > taken[steps - 1].episode
    assert min(after[0].frame_ids) > max(taken[steps - 1].frame_ids)
    assert relod(tmp_path, "log", "verify", str(folder)).returncode == 0
    busy = json.loads((folder / "run.json").read_text())
    assert len(busy["sessions"]) == 1


def test_a_running_run_cannot_be_resumed(tmp_path: Path) -> None:
    with robot(tmp_path) as run:
        run.wait_for_steps(20)
        done = relod(tmp_path, "robot", "--resume", str((run.folder / "latest").resolve()))
        assert done.returncode == 3
        assert "another relod writes" in done.stderr
        assert run.process.poll() is None


def test_what_does_not_fit_is_said_before_anything_moves(tmp_path: Path) -> None:
    done = relod(tmp_path, "robot", "--set", "replay.memory_mib=100", "--set", f"run.folder={tmp_path}")
    assert done.returncode == 2
    assert "replay.memory_mib allows 0.10 GiB" in done.stderr
    assert "replay.capacity=" in done.stderr
