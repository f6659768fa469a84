"""A run that goes on: exact in virtual time wherever it was interrupted, and refused where it would be another run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from relod.errors import EXIT_SAFETY, SafetyStop, SettingsError, StartError
from relod.runtime import memory, virtualsession
from relod.runtime.checkpoint import PUBLISHED_POLICY, find_checkpoint
from relod.runtime.learner import LearnerSide
from relod.runtime.log.writer import LogWriter
from relod.runtime.modes import resolve, run_robot
from relod.runtime.plan import Start
from relod.runtime.request import Request
from relod.runtime.rundir import RunFolder
from tests.fakes import small_request

STEPS = 330  # with a replay of 512 steps in chunks of 256: one chunk is retired on the way
QUICK = ("learner.checkpoint_every_s=0.05", "replay.capacity=512", "run.metrics_every_s=1")


class Killed(BaseException):
    """What no handler catches, as nothing is when a process is killed."""


def start(folder: Path, *assignments: str, steps: int = STEPS, algorithm: str = "sac") -> Request:
    return small_request(folder, *QUICK, *assignments, seed=4, steps=steps, algorithm=algorithm)


def go_on(folder: Path, *assignments: str, **fields) -> Request:
    """`relod robot --resume FOLDER` with nothing else said."""
    nothing = dict.fromkeys(("task", "mode", "algorithm", "preset", "world", "clock"))
    request = replace(small_request(folder), resume=folder, assignments=assignments, overrides={}, **nothing)
    return replace(request, **fields)


def kill_at(monkeypatch, tick: int) -> None:
    real = virtualsession._VirtualSession._take

    def take(self, found):
        if not self._playing and self._ticks == tick:
            raise Killed
        real(self, found)

    monkeypatch.setattr(virtualsession._VirtualSession, "_take", take)


def save_at(monkeypatch, tick: int) -> None:
    real = virtualsession._VirtualSession._on_tick

    def on_tick(self, *arguments):
        real(self, *arguments)
        if not self._playing and self._ticks == tick:
            self._save()

    monkeypatch.setattr(virtualsession._VirtualSession, "_on_tick", on_tick)


def run_folder(root: Path) -> Path:
    return (root / "latest").resolve()


def content(folder: Path) -> dict[str, object]:
    """All of a run that must not depend on interruptions."""
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    files = [*sorted((folder / "log").iterdir()), folder / "tape.bin", max((folder / "checkpoints").iterdir())]
    return {
        "episodes": [{key: value for key, value in line.items() if key != "wall_s"} for line in lines],
        **{file.name: file.read_bytes() for file in files if file.suffix != ".safetensors"},
        "learner": learner_state(max((folder / "checkpoints").iterdir())),
    }


def learner_state(path: Path) -> object:
    from relod.runtime.checkpoint import read_checkpoint

    found = read_checkpoint(path)
    extra = {key: found.counters["extra"][key] for key in ("log", "crc", "ticks", "actor", "first_step")}
    counters = {key: value for key, value in found.counters.items() if key != "extra"}
    return {name: tensor.numpy().tobytes() for name, tensor in found.tensors.items()}, counters, extra


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, object]:
    """The run that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    assert run_robot(start(root)).exit_code == 0
    return content(run_folder(root))


@pytest.mark.slow
@pytest.mark.parametrize("ticks", [(3,), (150,), (260, 420), (120, 300, 301)])
def test_killed_and_resumed_is_never_killed(whole, tmp_path, monkeypatch, ticks):
    request = start(tmp_path)
    for tick in ticks:
        with monkeypatch.context() as patch:
            kill_at(patch, tick)
            with pytest.raises(Killed):
                run_robot(request)
        request = go_on(run_folder(tmp_path))
    result = run_robot(request)
    assert result.exit_code == 0
    assert result.summary["steps"] == STEPS
    assert result.summary["returns"] == [line["return"] for line in whole["episodes"]]
    assert content(run_folder(tmp_path)) == whole


@pytest.mark.slow
def test_with_rollouts_too(tmp_path, monkeypatch):
    assert run_robot(start(tmp_path / "whole", algorithm="ppo")).exit_code == 0
    whole = content(run_folder(tmp_path / "whole"))
    request = start(tmp_path / "killed", algorithm="ppo")
    for tick in (60, 150, 290):  # within a rollout each
        with monkeypatch.context() as patch:
            kill_at(patch, tick)
            with pytest.raises(Killed):
                run_robot(request)
        request = go_on(run_folder(tmp_path / "killed"))
    result = run_robot(request)
    assert result.exit_code == 0
    assert result.summary["updates"] >= 3
    assert content(run_folder(tmp_path / "killed")) == whole


@pytest.mark.slow
def test_a_log_that_was_shortened_still_holds_what_the_checkpoint_needs(tmp_path, monkeypatch):
    small = ("log.segment_mib=1", "log.limit_gib=0.007", "agent.init_steps=9000", "agent.update_after=9000")
    rare = (*small, "learner.checkpoint_every_s=1e9")
    whole = tmp_path / "whole"
    run_robot(start(whole, *rare, steps=5000))
    assert not (run_folder(whole) / "log" / "segment-000001.relodlog").exists()
    with monkeypatch.context() as patch:
        kill_at(patch, 12_000)
        save_at(patch, 2500)  # the replay moves on by several segments after that
        with pytest.raises(Killed):
            run_robot(start(tmp_path / "killed", *rare, steps=5000))
    folder = run_folder(tmp_path / "killed")
    assert run_robot(go_on(folder)).exit_code == 0
    assert (folder / "tape.bin").read_bytes() == (run_folder(whole) / "tape.bin").read_bytes()
    assert learner_state(max((folder / "checkpoints").iterdir())) == learner_state(
        max((run_folder(whole) / "checkpoints").iterdir())
    )


@pytest.mark.slow
def test_more_steps_later_are_more_steps_at_once(whole, tmp_path):
    assert run_robot(start(tmp_path, steps=200)).summary["steps"] == 200
    result = run_robot(go_on(run_folder(tmp_path), overrides={"run.steps": STEPS}))
    assert result.summary["steps"] == STEPS
    assert content(run_folder(tmp_path)) == whole


@pytest.mark.slow
def test_ctrl_c_leaves_no_trace_in_a_resumed_run(whole, tmp_path, monkeypatch):
    real = virtualsession._Signals.caught

    def interrupted(self):
        self.number = 2
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(virtualsession._Signals, "caught", interrupted)
        result = run_robot(start(tmp_path))
    assert result.exit_code == 130
    assert run_robot(go_on(run_folder(tmp_path))).exit_code == 0
    assert content(run_folder(tmp_path)) == whole


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """A short run's folder; tests that change it copy it first."""
    root = tmp_path_factory.mktemp("short")
    run_robot(start(root, steps=60))
    return run_folder(root)


@pytest.fixture
def damaged(short, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(short, tmp_path / "run"))


def test_the_folder_says_when_it_went_on(damaged):
    run_robot(go_on(damaged, overrides={"run.steps": 70}))
    run = json.loads((damaged / "run.json").read_text())
    assert len(run["sessions"]) == 1
    assert run["summary"]["steps"] == 70
    assert run["summary"]["episodes"] == len((damaged / "episodes.jsonl").read_text().splitlines())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(damaged, capsys):
    newest = max((damaged / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    result = run_robot(go_on(damaged))
    assert result.summary["steps"] == 60
    said = capsys.readouterr().err
    assert newest.name in said
    assert "going on with learner-" in said


def test_no_readable_checkpoint(damaged):
    for path in (damaged / "checkpoints").iterdir():
        path.write_bytes(b"x" * 100)
    with pytest.raises(StartError, match=r"learner-.*damaged"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


def test_a_checkpoint_of_another_run(damaged):
    settings = damaged / "settings.toml"
    settings.write_text(settings.read_text().replace("hidden = [16]", "hidden = [24]"))
    with pytest.raises(StartError, match=r"belongs to another run: its agent\.hidden is \(16,\), not \(24,\);"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


def test_a_checkpoint_of_another_seed(damaged):
    settings = damaged / "settings.toml"
    settings.write_text(settings.read_text().replace("seed = 4", "seed = 5"))
    with pytest.raises(StartError, match="belongs to another run: its seed is 4, not 5"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


def test_a_log_cut_before_the_checkpoint(damaged):
    segment = next((damaged / "log").iterdir())
    segment.write_bytes(segment.read_bytes()[:2000])
    with pytest.raises(StartError, match="segment-000001"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


def test_a_tape_that_is_too_short(damaged):
    tape = damaged / "tape.bin"
    tape.write_bytes(tape.read_bytes()[:20])
    with pytest.raises(StartError, match=r"tape\.bin has 20 of"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


def test_a_tape_that_is_no_tape(damaged):
    tape = damaged / "tape.bin"
    tape.write_bytes(b"\x07" * len(tape.read_bytes()))
    with pytest.raises(StartError, match=r"tape\.bin is damaged: .*without its tape"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


def test_an_episode_that_cannot_be_read(damaged):
    lines = (damaged / "episodes.jsonl").read_text().splitlines()
    (damaged / "episodes.jsonl").write_text("\n".join(["x" * len(lines[0]), *lines[1:]]) + "\n")
    with pytest.raises(StartError, match=r"episodes\.jsonl is damaged"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


@pytest.mark.slow
def test_a_log_whose_beginning_is_gone(tmp_path):
    run_robot(start(tmp_path, "log.segment_mib=1", steps=400))
    folder = run_folder(tmp_path)
    (folder / "log" / "segment-000001.relodlog").unlink()
    with pytest.raises(StartError, match=r"begins at step 3\d\d, and the checkpoint needs it from step 0 on"):
        run_robot(go_on(folder, overrides={"run.steps": 410}))


@pytest.mark.parametrize("name", ["tape.bin", "log/segment-000001.relodlog"])
def test_what_cannot_go_on_stays_as_it_is(damaged, name):
    (damaged / name).write_bytes((damaged / name).read_bytes()[:20])
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    with pytest.raises(StartError):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))
    assert {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()} == before


def test_without_checkpoints_a_run_is_made_again_and_never_shorter(damaged, capsys):
    (damaged / "checkpoints").rename(damaged / "elsewhere")
    segment = damaged / "log" / "segment-000001.relodlog"
    before = segment.read_bytes()
    with pytest.raises(SettingsError, match="the run has 60 of 30 steps already"):
        run_robot(go_on(damaged, overrides={"run.steps": 30}))
    assert segment.read_bytes() == before
    assert run_robot(go_on(damaged, overrides={"run.steps": 61})).summary["steps"] == 61
    assert "no checkpoint: the run and its 60 steps are made again from the seed" in capsys.readouterr().err
    assert segment.read_bytes()[:20_000] == before[:20_000]


def test_a_run_of_another_version_is_told(damaged, capsys):
    run = json.loads((damaged / "run.json").read_text())
    (damaged / "run.json").write_text(json.dumps(run | {"relod": "0.0.9"}))
    resolve(go_on(damaged))
    assert "was made by relod 0.0.9, and this is" in capsys.readouterr().err


def test_the_policy_that_acted_is_there_before_the_worker(damaged):
    plan = resolve(go_on(damaged))
    checkpoint = find_checkpoint(plan.learner)
    assert checkpoint is not None
    with LearnerSide(plan.learner, damaged, None) as learner:
        learner.restore(checkpoint)
        host = learner.actor(Start(step=60, session=1))()
    assert host.version == (checkpoint.counters["epoch"], checkpoint.counters["published"])
    acting = [p.detach().numpy().ravel() for p in host._reader.module.parameters()]
    assert np.array_equal(np.concatenate(acting), checkpoint.tensors[PUBLISHED_POLICY].numpy())


def test_a_run_that_diverges_ends_with_its_summary(tmp_path):
    result = run_robot(start(tmp_path, "agent.critic_lr=1e30", steps=60))
    assert result.exit_code == EXIT_SAFETY
    assert "again at update" in str(result.error)
    assert json.loads((run_folder(tmp_path) / "run.json").read_text())["summary"]["exit_code"] == EXIT_SAFETY


def test_a_disk_that_is_full_for_all_files_is_told_once(tmp_path, monkeypatch):
    def full(what: str):
        def write(*_, **__):
            raise SafetyStop(f"{what} is full")

        return write

    monkeypatch.setattr(LogWriter, "append", full("the log"))
    monkeypatch.setattr(RunFolder, "episode", full("episodes.jsonl"))
    monkeypatch.setattr(RunFolder, "metrics", full("metrics.jsonl"))
    result = run_robot(start(tmp_path, steps=60))
    assert result.exit_code == EXIT_SAFETY
    assert str(result.error) == "the log is full"


def test_a_log_that_cannot_hold_the_replay(tmp_path):
    with pytest.raises(SettingsError, match=r"log\.limit_gib allows 0\.01 GiB, and the replay's 20,000 steps need"):
        run_robot(start(tmp_path, "log.limit_gib=0.01", "log.segment_mib=1", "replay.capacity=20000"))
    assert not list(tmp_path.iterdir())


def test_too_little_memory_to_go_on(damaged, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(SettingsError, match=r"the machine has 0\.00 GiB available.*; free some memory: a resumed run"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


def test_a_world_that_does_something_else(damaged):
    settings = damaged / "settings.toml"
    assert "wheel_tau_ms = 60.0" in settings.read_text()
    settings.write_text(settings.read_text().replace("wheel_tau_ms = 60.0", "wheel_tau_ms = 160.0"))
    with pytest.raises(StartError, match="did not do again"):
        run_robot(go_on(damaged, overrides={"run.steps": 70}))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"task": "track"}, "--task track differs from the run's create"),
        ({"algorithm": "ppo"}, "--algorithm ppo differs from the run's sac"),
        ({"preset": "paper"}, "--preset paper differs from the run's sac-lite"),
        ({"clock": "wall"}, "--clock wall differs from the run's virtual"),
        ({"robot": "/dev/ttyUSB0", "camera": "0"}, "it cannot go on in another"),
        ({"assignments": ("agent.gamma=0.9",)}, r"agent.gamma = 0.9 differs from the run's 0.995"),
        ({"overrides": {"run.seed": 9}}, r"run.seed = 9 differs from the run's 4"),
        ({"overrides": {"run.steps": 50}}, "the run has 59 of 50 steps already"),
        ({"config": Path("some.toml")}, "--config some.toml with --resume"),
        ({"profile": "laptop"}, "--profile laptop with --resume"),
    ],
)
def test_another_run_than_before_is_refused(damaged, fields, told):
    before = {path: path.read_bytes() for path in damaged.rglob("*.relodlog")}
    with pytest.raises(SettingsError, match=told):
        run_robot(go_on(damaged, **fields))
    assert {path: path.read_bytes() for path in damaged.rglob("*.relodlog")} == before


def test_what_a_session_may_change(short):
    plan = resolve(go_on(short, "learner.threads=2", "safety.stall_limit_s=5", overrides={"run.steps": 99}))
    assert plan.settings.learner.threads == 2
    assert plan.max_steps == 99
    assert plan.settings.agent == resolve(go_on(short)).settings.agent


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"task": "create"}'])
def test_no_run_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(StartError, match=r"run\.json"):
        resolve(go_on(tmp_path))


def test_a_folder_somebody_writes_to(short):
    plan = resolve(go_on(short))
    with (
        RunFolder.reopen(short, plan.settings, {}),
        pytest.raises(StartError, match="another relod writes"),
    ):
        run_robot(go_on(short, overrides={"run.steps": 70}))
