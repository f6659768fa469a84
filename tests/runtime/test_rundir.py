"""The run folder: what is written can be read back, nothing is overwritten, and a full disk is said once."""

import errno
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from relod import config
from relod.errors import SafetyStop, SettingsError, StartError
from relod.runtime import provenance, rundir
from relod.runtime.rundir import RunFolder, disk_errors, write_atomic
from relod.runtime.spans import SPAN, Stage
from relod.types import EpisodeEnd


def make_settings(tmp_path: Path, **run: object) -> config.Settings:
    return config.load({}, overrides={"run.folder": str(tmp_path / "runs"), **{f"run.{k}": v for k, v in run.items()}})


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create("create-local-only-s0", make_settings(tmp_path), {"simulated": True}) as opened:
        yield opened


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_end(episode: int = 0) -> EpisodeEnd:
    return EpisodeEnd(
        episode=episode,
        length=93,
        frame_ids=(1, 2, 3),
        proprio=np.zeros(8, np.float32),
        return_=-93.0,
        terminated=True,
        success=True,
        reason="target reached",
        observed_ns=7,
    )


def fill_disk(monkeypatch, number: int = errno.ENOSPC) -> None:
    """From now on every write stores one byte and then fails."""
    write = os.write
    state = {"left": 1}

    def failing(fd: int, data: bytes) -> int:
        if state["left"]:
            state["left"] -= 1
            return write(fd, bytes(data[:1]))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir.os, "write", failing)


# -- creation ----------------------------------------------------------------------------------------------------------


def test_the_name_says_when_what_and_which_seed(folder, monkeypatch):
    day, _, rest = folder.path.name.partition("T")
    assert len(day) == 10
    assert rest[8:] == "Z-create-local-only-s0"


def test_settings_read_back_to_the_same_values(tmp_path):
    settings = make_settings(tmp_path, seed=7)
    with RunFolder.create("x", settings, {}) as folder:
        assert config.load({}, file=folder.path / "settings.toml") == settings


def test_run_json_has_what_was_given_the_start_and_at_the_end_the_summary(folder):
    begun = json.loads((folder.path / "run.json").read_text())
    assert begun["simulated"] is True
    assert begun["started_utc"].endswith("+00:00")
    assert "summary" not in begun
    folder.update_run({"world_port": 4711})
    folder.finish({"steps": np.int64(12), "returns": [-1.0], "mean": np.float32(0.5), "where": folder.path})
    ended = json.loads((folder.path / "run.json").read_text())
    assert ended["summary"] == {"steps": 12, "returns": [-1.0], "mean": 0.5, "where": str(folder.path)}
    assert ended["world_port"] == 4711
    assert ended["finished_utc"] >= begun["started_utc"]


def test_two_runs_of_one_second_get_two_folders_and_latest_is_the_second(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "utc_seconds", lambda: 1795337000.0)
    with (
        RunFolder.create("x", make_settings(tmp_path), {}) as first,
        RunFolder.create("x", make_settings(tmp_path), {}) as second,
    ):
        assert first.path.name == "2026-11-22T08-43-20Z-x"
        assert second.path.name == "2026-11-22T08-43-20Z-x-2"
        latest = tmp_path / "runs" / "latest"
        assert latest.resolve() == second.path.resolve()
        assert not os.path.isabs(os.readlink(latest))


def test_something_else_called_latest_is_left_alone(tmp_path):
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    with RunFolder.create("x", make_settings(tmp_path), {}):
        assert not (tmp_path / "runs" / "latest").is_symlink()


def test_a_folder_that_cannot_be_made_is_a_start_error(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StartError, match=r"runs cannot be written: File exists"):
        RunFolder.create("x", make_settings(tmp_path), {})


def test_a_disk_full_at_the_start_is_a_start_error(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir, "write_atomic", full)
    with pytest.raises(StartError, match=r"the disk is full: .*; free some space, or set run\.folder"):
        RunFolder.create("x", make_settings(tmp_path), {})


# -- lines and spans ---------------------------------------------------------------------------------------------------


def test_metrics_are_lines_with_both_times_and_the_steps(folder):
    folder.metrics(experience_s=1.23456, wall_s=9, steps=3, values={"updates": 5, "lateness": {"p99": np.float64(0.5)}})
    folder.metrics(experience_s=2, wall_s=10, steps=4, values={"loss": float("nan"), "event": "camera: gone"})
    assert read_lines(folder.path / "metrics.jsonl") == [
        {"experience_s": 1.235, "wall_s": 9, "steps": 3, "updates": 5, "lateness": {"p99": 0.5}},
        {"experience_s": 2, "wall_s": 10, "steps": 4, "loss": None, "event": "camera: gone"},
    ]


def test_episodes_are_lines(folder):
    folder.episode(make_end(4), experience_s=4.185, wall_s=8.2, steps=93)
    assert read_lines(folder.path / "episodes.jsonl") == [
        {
            "experience_s": 4.185,
            "wall_s": 8.2,
            "steps": 93,
            "episode": 4,
            "length": 93,
            "return": -93.0,
            "terminated": True,
            "success": True,
            "reason": "target reached",
        }
    ]


def test_spans_are_read_back_by_what_the_header_says(folder):
    records = np.zeros(3, SPAN)
    records["stage"], records["end_ns"] = Stage.ACT, (1, 2, 3)
    folder.spans(records)
    folder.spans(records[:1])
    header = json.loads((folder.path / "spans.json").read_text())
    dtype = np.dtype([tuple(field) for field in header["dtype"]])
    found = np.fromfile(folder.path / header["file"], dtype)
    assert found["end_ns"].tolist() == [1, 2, 3, 1]
    assert found["stage"][0] == header["stages"]["act"]
    assert dtype.itemsize == header["record_bytes"]


def test_spans_beyond_the_limit_are_counted_not_kept(folder, monkeypatch):
    monkeypatch.setattr(rundir, "SPANS_LIMIT_BYTES", 10 * SPAN.itemsize)
    folder.spans(np.zeros(8, SPAN))
    folder.spans(np.zeros(3, SPAN))
    folder.spans(np.zeros(2, SPAN))
    assert folder.spans_dropped == 3
    assert (folder.path / "spans.bin").stat().st_size == 10 * SPAN.itemsize
    folder.finish({})
    assert json.loads((folder.path / "run.json").read_text())["spans_dropped"] == 3


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_safety_stop_and_leaves_no_half_line(folder, monkeypatch, number):
    folder.metrics(experience_s=1, wall_s=1, steps=1, values={})
    fill_disk(monkeypatch, number)
    with pytest.raises(SafetyStop, match=r"the disk is full: .*metrics\.jsonl; free some space"):
        folder.metrics(experience_s=2, wall_s=2, steps=2, values={})
    assert folder.failed
    assert len(read_lines(folder.path / "metrics.jsonl")) == 1
    # On the way out nothing raises again, and nothing pretends to have been written.
    folder.metrics(experience_s=3, wall_s=3, steps=3, values={})
    folder.episode(make_end(), experience_s=3, wall_s=3, steps=3)
    folder.spans(np.zeros(2, SPAN))
    folder.finish({"steps": 3})
    assert folder.spans_dropped == 2
    assert (folder.path / "episodes.jsonl").read_bytes() == b""


def test_another_failure_of_the_disk_is_named_too(folder, monkeypatch):
    fill_disk(monkeypatch, errno.EIO)
    with pytest.raises(SafetyStop, match=r"episodes\.jsonl cannot be written: Input/output error"):
        folder.episode(make_end(), experience_s=1, wall_s=1, steps=1)


def test_disk_errors_names_the_real_error_of_a_full_device():
    def write() -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(SafetyStop, match="the disk is full: here"), disk_errors(Path("here")):
        write()


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomic(tmp_path / "run.json", b"old")

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "run.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"old"


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def test_without_tensorboard_the_setting_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SettingsError, match=r"run\.tensorboard is set, .*; pip install relod\[tb\]"):
        RunFolder.create("x", make_settings(tmp_path, tensorboard="true"), {})


class FakeWriter:
    """Keeps what TensorBoard would have written."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.events: list[SimpleNamespace] = []
        self.closed = False

    def add_event(self, event: SimpleNamespace) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_numbers_by_environment_step(tmp_path, monkeypatch):
    class Summary(SimpleNamespace):
        Value = SimpleNamespace

    for name, content in {
        "tensorboard": {},
        "tensorboard.compat": {},
        "tensorboard.compat.proto": {},
        "tensorboard.compat.proto.event_pb2": {"Event": SimpleNamespace},
        "tensorboard.compat.proto.summary_pb2": {"Summary": Summary},
        "tensorboard.summary": {},
        "tensorboard.summary.writer": {},
        "tensorboard.summary.writer.event_file_writer": {"EventFileWriter": FakeWriter},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    with RunFolder.create("x", make_settings(tmp_path, tensorboard="true"), {}) as folder:
        folder.metrics(experience_s=1, wall_s=1, steps=40, values={"loss": 2, "act": {"p99": 3.5}, "event": "text"})
        folder.episode(make_end(), experience_s=1, wall_s=1, steps=93)
        writer = folder._events._writer
        metrics, episode = writer.events
        assert metrics.step == 40
        assert {value.tag: value.simple_value for value in metrics.summary.value} == {"loss": 2.0, "act/p99": 3.5}
        assert {value.tag: value.simple_value for value in episode.summary.value} == {
            "episode/return": -93.0,
            "episode/length": 93.0,
        }
    assert writer.closed


# -- provenance --------------------------------------------------------------------------------------------------------


def test_provenance_is_plain_and_imports_nothing_heavy():
    found = provenance.describe(["relod", "run"])
    assert found["argv"] == ["relod", "run"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found["packages"]) >= {"numpy", "torch"}
    assert found["cpu"]
    json.dumps(found)


def test_the_commit_is_that_of_a_checkout_and_none_elsewhere(tmp_path):
    assert provenance._commit(tmp_path) is None
    commit = provenance._commit(Path(provenance.__file__).parent)
    assert commit is None or len(commit.removesuffix("+changes")) == 40
