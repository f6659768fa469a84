"""A learner's session: how it begins, goes on and ends, with a server that plays a script."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from relod.algos.agent import flatten_policy
from relod.algos.sac import SAC
from relod.errors import SafetyStop, SettingsError
from relod.runtime.host import Result
from relod.runtime.log.format import Kind
from relod.runtime.log.reader import LogReader
from relod.runtime.log.writer import LogWriter
from relod.runtime.policy import PolicyWriter
from relod.runtime.processes import Supervisor
from relod.runtime.remote.learnerrequest import choose_access, choose_teaching
from relod.runtime.remote.learnersession import LearnerSession, run_learner
from relod.runtime.remote.wire import LearnerNews, Refused
from tests.runtime.remote.teaching import OTHER_RUN, RobotTape, make_join
from tests.runtime.remote.test_learnerrequest import make_request
from tests.runtime.smallrun import SPEC

SMALL = (
    *("replay.capacity=512", "learner.threads=1", "server.max_robots=2", "run.metrics_every_s=0.1"),
    *(f"agent.{name}={value}" for name, value in (("conv_channels", 4), ("conv_strides", [2, 1]), ("hidden", [16]))),
    *("agent.batch_size=8", "agent.shift_px=1", "agent.init_steps=20"),
)


class FakeServer:
    """Plays `script(hall, server)` once it listens; keeps what it was told."""

    script: Callable[..., Any]

    def __init__(self, *, hall: Any, **_: Any) -> None:
        self.hall = hall
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.told: list[Any] = []
        self.published: list[Any] = []
        self.closed: list[str | None] = []
        self._playing: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        pass

    def settle(self, image_hw: tuple[int, int], precision: str) -> None:
        pass

    async def start(self, host: str, port: int, *, listening: bool = True) -> int:
        self._playing = asyncio.create_task(self._play())
        return 8765

    async def _play(self) -> None:
        try:
            await type(self).script(self.hall, self)
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)

    def publish(self, values: Any, version: tuple[int, int]) -> None:
        self.published.append((values, version))

    def tell(self, message: Any) -> None:
        self.told.append(message)

    async def close(self, finished: str | None) -> None:
        self.closed.append(finished)
        if self._playing is not None:
            await asyncio.wait([self._playing], timeout=5)

    def figures(self) -> dict[str, dict[str, Any]]:
        return {"x": {"state": "away", "bytes_in": 1000, "bytes_out": 10, "duplicates": 2}}


class Play:
    """One session with a script; `result` and `server` afterwards."""

    def __init__(self, folder: Any, script: Any, *assignments: str, **fields: Any) -> None:
        fields.setdefault("assignments", (*SMALL, f"run.folder={folder}", *assignments))
        request = make_request(**fields)
        servers: list[FakeServer] = []

        class Server(FakeServer):
            pass

        Server.script = script

        def make_server(**arguments: Any) -> FakeServer:
            servers.append(Server(**arguments))
            return servers[-1]

        teaching = choose_teaching(request)
        self.session = LearnerSession(teaching, choose_access(request, folder), make_server)
        self.result: Result = self.session.run()
        (self.server,) = servers

    @property
    def kinds(self) -> list[Kind]:
        return [record.kind for record in LogReader(self.folder / "log").iterate()]

    @property
    def folder(self) -> Any:
        assert self.session.learning is not None
        return self.session.learning.folder.path


@pytest.fixture
def no_worker(monkeypatch):
    """The session's own part alone."""
    monkeypatch.setattr(Supervisor, "start", lambda *args, **kwargs: None)


def interrupt(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def nobody(hall: Any, server: Any) -> None:
    interrupt()


def sends(*, robot: str = "x", steps: int = 3, ends: bool = True, after: Any = interrupt) -> Any:
    """A robot that comes, sends an episode, and what happens then."""

    async def script(hall: Any, server: Any) -> None:
        tape = RobotTape()
        admission = hall.admit(make_join(robot))
        for _ in range(steps):
            hall.record(admission, *tape.step())
        if ends:
            hall.record(admission, *tape.end())
        hall.left(admission, "it said goodbye")
        if after is not None:
            after()

    return script


# -- without a run -----------------------------------------------------------------------------------------------------


def test_ctrl_c_before_any_robot(tmp_path, capsys):
    play = Play(tmp_path, nobody)
    assert (play.result.exit_code, play.result.error) == (130, None)
    assert play.server.closed == ["the learner was ended"]
    assert (play.result.summary["robots"], play.result.summary["run_dir"]) == ({}, "")
    assert not any(tmp_path.iterdir())
    told = capsys.readouterr().err
    assert "relod robot --task TASK --mode remote-local --learner ws://127.0.0.1:8765" in told


def test_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run_learner(make_request(listen=address, assignments=(*SMALL, f"run.folder={tmp_path}")))
    assert result.exit_code == 3
    assert address.rpartition(":")[2] in str(result.error)


def test_a_first_robot_that_does_not_fit_leaves_the_learner_waiting(tmp_path, no_worker):
    async def script(hall, server):
        with pytest.raises(SettingsError, match="suggests settings in the section 'log'"):
            hall.admit(make_join("bad", presets={"sac-lite": {"log": {"limit_gib": 1e9}}}))
        huge = replace(SPEC, camera_hw=(4000, 4000), image_hw=(4000, 4000))
        with pytest.raises(SettingsError, match="the replay needs"):
            hall.admit(make_join("huge", task=huge))
        await sends()(hall, server)

    play = Play(tmp_path, script)
    assert play.result.exit_code == 130
    assert list(play.result.summary["robots"]) == ["x"]
    assert len([path for path in tmp_path.iterdir() if not path.is_symlink()]) == 1


# -- ends --------------------------------------------------------------------------------------------------------------


def test_the_summary_tells_what_came(tmp_path, no_worker):
    play = Play(tmp_path, sends(), "run.seed=5")
    summary = play.result.summary
    assert summary["robots"]["x"] | {"run": ""} == {
        "run": "",
        "acts": "robot",
        "records": 4,
        "steps": 3,
        "episodes": 1,
        "reconnects": 0,
        "policy_version": [1, 0],
        "duplicates": 2,
        "rejected": 0,
        "frames": 0,
        "asked": 0,
        "answered": 0,
        "uplink_bytes": 1000,
        "downlink_bytes": 10,
    }
    assert (summary["mode"], summary["task"], summary["seed"]) == ("learner", "small", 5)
    assert (summary["steps"], summary["episodes"], summary["returns"]) == (3, 1, [-3.0])
    assert summary["run_dir"] == str(play.folder)
    assert play.folder.name.endswith("-learner-small-s5")
    assert json.loads((play.folder / "run.json").read_text())["summary"] == summary
    assert (play.folder / "learning-curve.png").exists()


def test_after_its_steps_the_robots_are_told(tmp_path, no_worker):
    play = Play(tmp_path, sends(steps=5, ends=False, after=None), "run.steps=4")
    assert (play.result.exit_code, play.result.error) == (0, None)
    assert play.server.closed == ["the learner's 4 steps are done"]
    assert play.kinds == [Kind.STEP] * 5 + [Kind.CUT]  # what comes after the limit is kept too


def test_after_its_minutes_too(tmp_path, no_worker):
    play = Play(tmp_path, sends(steps=3, ends=False, after=None), "run.minutes=0.0015")  # 2 steps of 45 ms
    assert play.server.closed == ["the learner's 2 steps are done"]


def test_after_sigterm_the_robots_wait_and_their_episodes_stay_open(tmp_path, no_worker):
    play = Play(tmp_path, sends(ends=False, after=lambda: interrupt(signal.SIGTERM)))
    assert play.result.exit_code == 143
    assert play.server.closed == [None]
    assert play.kinds == [Kind.STEP] * 3


def test_a_log_that_cannot_be_written_ends_it(tmp_path, no_worker, monkeypatch):
    def full(*_: Any) -> None:
        raise SafetyStop("the disk is full: there")

    async def script(hall, server):
        monkeypatch.setattr(LogWriter, "close_episode", full)
        try:
            await sends()(hall, server)
        except SafetyStop as error:
            server.failed.set_exception(error)

    play = Play(tmp_path, script)
    assert play.result.exit_code == 4
    assert play.result.summary["error"] == "the disk is full: there"
    (refused,) = (message for message in play.server.told if isinstance(message, Refused))
    assert (refused.exit_code, refused.message) == (4, "the learner ended: the disk is full: there")
    assert play.server.closed == [None]


def test_after_a_failure_nothing_is_acked(tmp_path, no_worker):
    async def script(hall, server):
        tape, admission = RobotTape(), hall.admit(make_join())
        hall.record(admission, *tape.step())
        server.failed.set_exception(SafetyStop("the disk is full"))
        await asyncio.sleep(0.05)
        with pytest.raises(SafetyStop, match="the learner has failed: the disk is full"):
            hall.record(admission, *tape.step())

    play = Play(tmp_path, script)
    assert play.result.exit_code == 4
    assert play.kinds == [Kind.STEP]


def test_a_defect_is_raised(tmp_path):
    async def script(hall, server):
        server.failed.set_exception(KeyError("a defect"))

    with pytest.raises(KeyError, match="a defect"):
        Play(tmp_path, script)


def test_a_worker_that_is_lost_for_good_ends_it(tmp_path, no_worker):
    async def script(hall, server):
        hall.admit(make_join())
        hall._supervisor.failure = SafetyStop("learning diverged a second time")
        hall._supervisor.failed.set()

    play = Play(tmp_path, script)
    assert (play.result.exit_code, str(play.result.error)) == (4, "learning diverged a second time")


def test_a_second_ctrl_c_waits_for_nobody(tmp_path):
    async def script(hall, server):
        interrupt()
        await asyncio.sleep(0.05)
        assert server.closed  # it waits for robots to say goodbye
        interrupt()
        await asyncio.sleep(60)

    play = Play(tmp_path, script)
    assert play.result.exit_code == 130
    assert play.result.summary["wall_s"] < 5


# -- what it passes on -------------------------------------------------------------------------------------------------


def test_policies_and_news_go_to_the_robots(tmp_path, no_worker):
    async def script(hall, server):
        hall.admit(make_join())
        flat = flatten_policy(SAC.build_actor(SPEC, hall.learning.plan.settings.agent))
        for updates in (1, 2):
            PolicyWriter(hall.learning.learner.box).publish(flat * updates, (1, updates))
            await until(lambda: len(server.published) == updates)  # noqa: B023
            assert (server.published[-1][0] == flat * updates).all()
        await until(lambda: any(isinstance(message, LearnerNews) for message in server.told))
        interrupt()

    play = Play(tmp_path, script)
    assert [version for _, version in play.server.published] == [(1, 1), (1, 2)]
    assert play.result.summary["policy_version"] == [1, 2]


def test_metrics_name_the_robots(tmp_path, no_worker):
    play = Play(tmp_path, sends())
    lines = [json.loads(line) for line in (play.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["robots"]["x"]["steps"] == 3
    assert any("x joined" in line.get("event", "") for line in lines)
    assert any(line.get("event") == "x left: it said goodbye" for line in lines)


# -- going on ----------------------------------------------------------------------------------------------------------


def go_on(folder: Any, script: Any, *assignments: str, **fields: Any) -> Play:
    return Play(folder.parent, script, resume=folder, assignments=assignments, **fields)


def test_a_run_goes_on_where_it_was(tmp_path, no_worker):
    tape, first = RobotTape(), {}

    async def before(hall, server):
        admission = hall.admit(make_join())
        first["learner"] = admission.welcome.learner
        hall.record(admission, *tape.step())
        hall.record(admission, *tape.step())
        interrupt(signal.SIGTERM)

    async def after(hall, server):
        admission = hall.admit(make_join())
        assert admission.welcome.learner == first["learner"]
        assert admission.welcome.position == (0, 1)
        hall.record(admission, *tape.step())
        hall.record(admission, *tape.end())

    folder = Play(tmp_path, before).folder
    play = go_on(folder, after, "run.steps=3", "learner.threads=2")
    assert (play.result.exit_code, play.result.error) == (0, None)
    assert play.kinds == [Kind.STEP, Kind.STEP, Kind.STEP, Kind.END]
    assert play.folder == folder
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 1
    done = go_on(folder, nobody, "run.steps=3")
    assert (done.result.exit_code, done.server.closed) == (2, [None])
    assert "3 of 3 steps already" in str(done.result.error)


def test_a_run_that_goes_on_keeps_its_settings_and_its_task(tmp_path, no_worker):
    folder = Play(tmp_path, sends()).folder
    with pytest.raises(SettingsError, match=r"agent\.batch_size = 16 differs from the run's 8"):
        go_on(folder, nobody, "agent.batch_size=16")
    with pytest.raises(SettingsError, match="--preset sac with --resume"):
        go_on(folder, nobody, preset="sac")

    async def other(hall, server):
        with pytest.raises(SettingsError, match="its name is 'other'"):
            hall.admit(make_join(task=replace(SPEC, name="other")))
        hall.admit(make_join(run=OTHER_RUN))
        interrupt()

    assert go_on(folder, other).result.exit_code == 130


def test_a_record_that_comes_while_the_worker_is_dead_is_kept(tmp_path, no_worker):
    async def script(hall, server):
        tape, admission = RobotTape(), hall.admit(make_join())
        job = hall.learning.learner.worker_job()
        hall.record(admission, *tape.step())
        hall.learning.learner.poll()
        job.link.close()
        hall.record(admission, *tape.step())
        assert hall.learning.learner.poll() == {}
        interrupt()

    play = Play(tmp_path, script)
    assert play.result.exit_code == 130
    assert play.kinds == [Kind.STEP, Kind.STEP, Kind.CUT]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_real_worker_learns_and_is_started_again_when_it_dies(tmp_path):
    async def script(hall, server):
        tape, admission = RobotTape(), hall.admit(make_join())
        killed = False
        while not killed or hall.books.state.policy_version[0] < 2:
            if hall.books.state.policy_version >= (1, 1) and not killed:
                killed = True
                hall._supervisor.children["worker"].process.kill()
            hall.record(admission, *tape.step())
            await asyncio.sleep(0.01)
        hall.record(admission, *tape.end())
        interrupt()

    play = Play(tmp_path, script)
    summary = play.result.summary
    assert (play.result.exit_code, play.result.error) == (130, None)
    assert summary["restarts"] == 1
    assert summary["policy_version"][1] > 0
    assert [version[0] for _, version in play.server.published][-1] == 2
    assert list((play.folder / "checkpoints").iterdir())
