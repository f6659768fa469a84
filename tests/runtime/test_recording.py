"""Recordings: a run replays bit for bit, and a recording that was changed is told from one that was not."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from relod import cli
from relod.config import load
from relod.errors import EXIT_BUG, EXIT_OK, EXIT_START, StartError
from relod.robots.create2.reacher import CREATE_REACHER
from relod.robots.create2.world import VirtualCreate
from relod.robots.vision import make_shrink
from relod.runtime import recording
from relod.runtime.clock import NS_PER_S
from relod.runtime.control import _record
from relod.runtime.cycle import Cycle, Inputs, Tick
from relod.runtime.learner import LearnerSide
from relod.runtime.messages import CycleRecord, decode, encode
from relod.runtime.modes import resolve
from relod.runtime.plan import Start, steps_limit
from relod.runtime.playback import replay_run
from relod.runtime.recording import Recorder
from relod.runtime.session import open_folder
from relod.runtime.virtual import VirtualRun
from relod.seeds import random_stream
from relod.types import EpisodeEnd, Frame, Step
from tests.fakes import small_request

Message = CycleRecord | Step | EpisodeEnd


def record(folder: Path, *assignments: str, stop_after: int | None = None) -> Path:
    """A recorded run, made in virtual time by a stand-in for the control process and its parent."""
    torch.set_num_threads(1)
    plan = resolve(small_request(folder, *assignments, steps=0 if assignments else 90))
    spec, settings = plan.task.spec, plan.settings
    with open_folder(plan, ()) as run_folder:
        learner = LearnerSide(plan.learner, run_folder.path, None)
        host = learner.actor(Start(), run_folder.path / "policies")()
        cycle = Cycle(
            task=plan.task,
            actor=host.actor,
            safety=settings.safety,
            rng=random_stream(settings.run.seed, "reset"),
            shrink=make_shrink(spec.image_hw),
            max_steps=plan.max_steps,
        )
        recorder = Recorder(run_folder.path)

        def on_frames(frames: list[Frame]) -> None:
            for frame in frames:
                recorder.add_frame(frame)
                learner.add_frame(frame)

        def on_tick(now_ns: int, inputs: Inputs, tick: Tick) -> None:
            recorder.add_message(encode(_record(now_ns, inputs, tick, host.version)))
            keep(tick)
            loop.run_updates()
            host.poll()

        def keep(tick: Tick) -> None:
            for message in (tick.step, tick.end):
                if message is not None:
                    recorder.add_message(encode(message))
                    learner.add(message)

        run = VirtualRun(
            cycle=cycle,
            world=VirtualCreate(settings.sim, settings.run.seed, spec, NS_PER_S),
            spec=spec,
            sensor_names=plan.entry.sensor_names,
            on_frames=on_frames,
            on_tick=on_tick,
        )
        loop = learner.inline(run.clock)
        for _ in run.ticks():
            if stop_after is not None and cycle.steps >= stop_after:
                keep(cycle.interrupt("SIGINT"))
                break
        recorder.close()
    return run_folder.path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def run_folder(made, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def read(folder: Path) -> list[Message]:
    data, at, found = (folder / "trace.bin").read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        found.append(decode(data[at + 4 : at + 4 + length]))
        at += 4 + length
    return found


def write(folder: Path, messages: list[bytes]) -> None:
    (folder / "trace.bin").write_bytes(b"".join(struct.pack("<I", len(data)) + data for data in messages))


def change(folder: Path, kind: type, number: int, how: Callable) -> int:
    """Change one message of a kind; returns the number of cycles up to it."""
    messages = read(folder)
    index = [n for n, message in enumerate(messages) if isinstance(message, kind)][number]
    messages[index] = how(messages[index])
    write(folder, [encode(message) for message in messages])
    return sum(isinstance(message, CycleRecord) for message in messages[: index + 1])


def test_a_run_replays_identically(made):
    report = replay_run(made)
    messages = read(made)
    assert report.identical, report
    assert (report.cycles, report.steps, report.episodes) == tuple(
        sum(isinstance(message, kind) for message in messages) for kind in (CycleRecord, Step, EpisodeEnd)
    )
    assert report.steps == 90
    assert report.episodes > 1
    assert len(list((made / "policies").iterdir())) > 1  # more than one learned policy acted
    assert str(report).endswith("identical")


@pytest.mark.parametrize(
    ("kind", "number", "how", "told"),
    [
        (CycleRecord, 70, lambda m: msgspec.structs.replace(m, command=(1.0, 2.0)), "command: recorded ((1.0, 2.0)"),
        (CycleRecord, 9, lambda m: msgspec.structs.replace(m, phase="over"), "command: recorded"),
        (Step, 60, lambda m: dataclasses.replace(m, reward=m.reward + 1e-12), "step: recorded"),
        (Step, 3, lambda m: dataclasses.replace(m, action=np.nextafter(m.action, np.float32(2))), "step: recorded"),
        (Step, 50, lambda m: dataclasses.replace(m, policy_version=(1, 1)), "step: recorded"),
        (EpisodeEnd, 0, lambda m: dataclasses.replace(m, length=m.length + 1), "end of episode: recorded"),
    ],
)
def test_the_first_difference_is_reported_with_its_cycle(run_folder, kind, number, how, told):
    cycle = change(run_folder, kind, number, how)
    report = replay_run(run_folder)
    assert not report.identical
    assert report.cycles == cycle
    assert report.difference.startswith(f"cycle {cycle}: {told}")
    assert "difference" in str(report)


def test_other_packets_give_another_run(run_folder):
    messages = read(run_folder)
    in_episodes = [n for n, message in enumerate(messages) if isinstance(message, Step)]
    record = messages[in_episodes[20] - 1]
    assert isinstance(record, CycleRecord)
    messages[in_episodes[20] - 1] = msgspec.structs.replace(record, sensor_values=bytes(len(record.sensor_values)))
    write(run_folder, [encode(message) for message in messages])
    report = replay_run(run_folder)
    assert not report.identical
    assert report.difference.startswith(
        f"cycle {sum(isinstance(m, CycleRecord) for m in messages[: in_episodes[20]])}: "
    )


def test_other_pixels_give_another_run(run_folder):
    frames = (run_folder / "frames.bin").read_bytes()
    half = len(frames) // 2
    frame_bytes = 24 + 24 * 32 * 3
    spoilt = bytearray(frames)
    for start in range(half // frame_bytes * frame_bytes, len(frames), frame_bytes):
        spoilt[start + 24 : start + frame_bytes] = bytes([40, 200, 40]) * (24 * 32)  # all the target's green
    (run_folder / "frames.bin").write_bytes(spoilt)
    assert not replay_run(run_folder).identical


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_a_torn_tail_is_left_out(run_folder, cut):
    data = (run_folder / "trace.bin").read_bytes()
    (run_folder / "trace.bin").write_bytes(data[:-cut])
    report = replay_run(run_folder)
    assert report.identical, report
    assert report.steps in (89, 90)


def test_an_empty_trace_is_no_cycle(run_folder):
    (run_folder / "trace.bin").write_bytes(b"\x05\x00")
    report = replay_run(run_folder)
    assert (report.cycles, report.identical) == (0, True)


def test_a_message_that_is_none_is_reported(run_folder):
    messages = [encode(message) for message in read(run_folder)]
    messages[40] = b"\xc1" * 30
    write(run_folder, messages)
    assert "cannot be read" in replay_run(run_folder).difference


@pytest.mark.parametrize("name", ["trace.bin", "frames.bin", "run.json", "settings.toml"])
def test_a_folder_without_a_recording_is_an_error_of_the_start(run_folder, name):
    (run_folder / name).unlink()
    with pytest.raises(StartError, match="holds no recording"):
        replay_run(run_folder)


def test_a_policy_that_is_missing_is_named(run_folder):
    policies = sorted((run_folder / "policies").iterdir(), key=lambda path: int(path.stem.partition("-")[2]))
    policies[0].unlink()
    with pytest.raises(StartError, match=policies[0].name):
        replay_run(run_folder)


def test_a_recording_that_reached_its_size_limit_replays_as_far_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "FRAMES_LIMIT_BYTES", 100 * (24 + 24 * 32 * 3))
    report = replay_run(record(tmp_path))
    assert report.identical, report
    assert 0 < report.cycles < 90


def test_a_run_bounded_by_minutes_ends_at_the_same_step_when_replayed(tmp_path):
    report = replay_run(record(tmp_path, "run.minutes=0.02"))
    assert report.identical, report
    assert report.steps == round(0.02 * 60 / 0.045)


def test_a_run_that_was_interrupted_replays_to_the_interruption(tmp_path):
    report = replay_run(record(tmp_path, stop_after=10))
    assert report.identical, report
    assert (report.steps, report.episodes) == (10, 1)


def test_the_limit_of_a_run_is_the_nearer_of_steps_and_minutes():
    def limit(*assignments: str) -> int:
        return steps_limit(load(CREATE_REACHER.sections(), assignments=assignments).run, 45_000_000)

    assert limit() == 0
    assert limit("run.steps=7") == 7
    assert limit("run.minutes=3") == 4000
    assert limit("run.steps=7", "run.minutes=3") == 7
    assert limit("run.steps=7000", "run.minutes=3") == 4000
    assert limit("run.minutes=0.0001") == 1  # no limit would be the opposite of what was asked for


def test_the_command_says_what_it_found(run_folder, capsys):
    assert cli.run(["replay", str(run_folder), "--json"]) == EXIT_OK
    out, err = capsys.readouterr()
    assert msgspec.json.decode(out)["identical"] is True
    assert "identical" in err
    change(run_folder, Step, 0, lambda m: dataclasses.replace(m, reward=5.0))
    assert cli.run(["replay", str(run_folder)]) == EXIT_BUG
    out, err = capsys.readouterr()
    assert out == ""
    assert "difference" in err
    (run_folder / "trace.bin").unlink()
    assert cli.run(["replay", str(run_folder)]) == EXIT_START
    assert capsys.readouterr().err.count("\n") == 1
