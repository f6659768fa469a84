"""Learner and robots as users start them: the remote modes, and every way in which either end or the link dies."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest

from relod.runtime.log.reader import LogReader, find_log
from relod.runtime.modes import MODES
from relod.types import Step
from tests.commands import QUICK_LEARNER, QUICK_ROBOT, Run, children, learner, relod, resumed, robot
from tests.namespaces import LEARNER_ADDRESS, cable
from tests.runtime.remote.certificates import LOCAL_CERT, LOCAL_KEY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

REMOTE = ("remote-local", "remote-only")
KEYS = {
    *("sent", "acked", "resent", "duplicates", "reconnects", "backlog_max", "rtt_ms", "uplink_bytes"),
    *("downlink_bytes", "policy_age_ms", "late_actions"),
}
LEARNER_KEYS = {"robots", "ingest_steps_per_s", "updates", "policy_version", "run_dir"}


def distant(url: str, mode: str, *arguments: str) -> tuple[str, ...]:
    return ("--mode", mode, "--learner", url, "--name", "arm", *arguments)


def audited(folder: Path, run: Run, learner_run: Path) -> dict:
    """The report of `relod audit`, which must find nothing wrong."""
    robot_run = folder / run.result()["run_dir"]
    done = relod(folder, "audit", str(robot_run), str(learner_run), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, (report, done.stderr)
    return report


@pytest.mark.parametrize("mode", REMOTE)
def test_a_robot_and_a_learner(tmp_path: Path, mode: str) -> None:
    with (
        learner(tmp_path, name="-learner") as teacher,
        robot(tmp_path, *distant(teacher.url, mode, "--steps", "150"), quick=QUICK_ROBOT) as run,
    ):
        assert run.wait() == 0, run.messages()
        result = run.result()
        assert result.keys() >= KEYS
        assert (result["steps"], result["stopped_cleanly"], result["simulated"]) == (150, True, True)
        assert result["sent"] == result["acked"] == 150 + len(result["returns"])
        teacher.wait_for_updates()  # the worker gets only what time the others leave
        teacher.process.send_signal(signal.SIGINT)
        assert teacher.wait() == 130, teacher.messages()
        taught = teacher.result()
        assert taught.keys() >= LEARNER_KEYS
        assert (taught["steps"], taught["robots"]["arm"]["steps"]) == (150, 150)
        assert taught["updates"] > 0
        audited(tmp_path, run, tmp_path / taught["run_dir"])


QUICK_PPO = tuple(
    word
    for setting in (
        *(
            "agent.rollout_steps=60",
            "agent.reuse_steps=120",
            "agent.epochs=1",
            "agent.hidden=[32]",
            "agent.conv_channels=8",
        ),
        *("replay.capacity=2000", "run.metrics_every_s=0.25"),
    )
    for word in ("--set", setting)
)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_rollout_is_of_one_policy_in_every_mode(tmp_path: Path, mode: str) -> None:
    """The robot waits for each update, and an episode is acted by one policy. Elsewhere it takes what is taught."""
    short = ("--task", "track", "--steps", "200", "--set", "task.episode_steps=30")
    with contextlib.ExitStack() as stack:
        if mode == "local-only":
            run = stack.enter_context(robot(tmp_path, *short, "--algo", "ppo", quick=QUICK_PPO))
            assert run.wait() == 0, run.messages()
            updates, folder = run.result()["updates"], tmp_path / run.result()["run_dir"]
        else:
            teacher = stack.enter_context(learner(tmp_path, "--algo", "ppo", name="-learner", quick=QUICK_PPO))
            run = stack.enter_context(robot(tmp_path, *distant(teacher.url, mode, *short), quick=()))
            assert run.wait() == 0, run.messages()
            teacher.process.send_signal(signal.SIGINT)
            assert teacher.wait() == 130, teacher.messages()
            updates, folder = teacher.result()["updates"], tmp_path / teacher.result()["run_dir"]
            audited(tmp_path, run, folder)
    assert run.result()["algorithm"] == "ppo"
    episodes: dict[int, list[tuple[int, int]]] = {}
    for record in LogReader(find_log(folder)).iterate():
        if isinstance(record.message, Step):
            episodes.setdefault(record.message.episode, []).append(record.message.policy_version)
    assert all(len(set(versions)) == 1 for versions in episodes.values())
    acted = [versions[0][1] for versions in episodes.values()]  # two episodes of 30 steps are a rollout
    assert acted == [episode // 2 for episode in range(len(acted))]
    assert updates in (3, 4)


@pytest.mark.skipif(importlib.util.find_spec("rtde_control") is None, reason="no ur_rtde here")
@pytest.mark.parametrize("mode", list(MODES))
def test_the_ur5_in_every_mode(tmp_path: Path, mode: str) -> None:
    with contextlib.ExitStack() as stack:
        arguments: tuple[str, ...] = ("--task", "ur5", "--steps", "110")
        if mode == "local-only":
            run = stack.enter_context(robot(tmp_path, *arguments, quick=QUICK_LEARNER))
        else:
            teacher = stack.enter_context(learner(tmp_path, name="-learner"))
            run = stack.enter_context(robot(tmp_path, *distant(teacher.url, mode, *arguments), quick=()))
        assert run.wait() == 0, run.messages()
        result = run.result()
    assert (result["steps"], result["episodes"], result["stopped_cleanly"]) == (110, 2, True)
    assert result["lengths"][0] == 100
    log = [json.loads(line) for line in (tmp_path / result["run_dir"] / "wheels.jsonl").read_text().splitlines()]
    assert log, "the arm never moved"


@pytest.mark.parametrize("mode", list(MODES))
def test_which_processes_run_where(tmp_path: Path, mode: str) -> None:
    simulated = {"world"}
    row = MODES[mode]
    with learner(tmp_path, name="-learner") as teacher:
        arguments = distant(teacher.url, mode) if row.on_learner else ()
        quick = {} if not row.on_learner else {"quick": QUICK_ROBOT}
        with robot(tmp_path, *arguments, **quick) as run:
            run.wait_for_steps(10)
            found = {name.removeprefix("relod-") for name in children(run.process.pid)} - simulated
            device = run.pid_of("device")
            found |= {"guard"} if any("guard" in command_line(pid) for pid in children(device).values()) else set()
            assert found | {"parent"} >= set(row.on_robot)
            assert ("worker" in found) == ("worker" in row.on_robot)
            taught = {name.removeprefix("relod-") for name in children(teacher.process.pid)}
            assert ("worker" in taught) == ("worker" in row.on_learner)
            if mode == "remote-only":
                loaded = (Path("/proc") / str(run.pid_of("control")) / "maps").read_text()
                parent = (Path("/proc") / str(run.process.pid) / "maps").read_text()
                assert "libtorch" not in loaded
                assert "libtorch" not in parent


def command_line(pid: int) -> str:
    return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.mark.parametrize("mode", REMOTE)
def test_a_learner_that_is_killed_and_resumed(tmp_path: Path, mode: str) -> None:
    with (
        learner(tmp_path, name="-1") as first,
        robot(tmp_path, *distant(first.url, mode, "--steps", "250"), quick=QUICK_ROBOT) as run,
    ):
        run.wait_for_steps(60)
        folder, port = first.run_folder, first.url.rpartition(":")[2]
        first.kill()
        time.sleep(1.0)
        with resumed(tmp_path, folder, listen=f"127.0.0.1:{port}", name="-2") as second:
            assert run.wait(120) == 0, run.messages()
            result = run.result()
            assert (result["steps"], result["stopped_cleanly"]) == (250, True)
            assert result["reconnects"] >= 1
            audited(tmp_path, run, folder)
            second.process.send_signal(signal.SIGINT)
            assert second.wait() == 130, second.messages()
            assert second.result()["steps"] == 250


def test_a_learner_that_is_finished_ends_its_robots(tmp_path: Path) -> None:
    with (
        learner(tmp_path, "--steps", "80", name="-learner") as teacher,
        robot(tmp_path, *distant(teacher.url, "remote-local"), quick=QUICK_ROBOT) as run,
    ):
        assert teacher.wait() == 0, teacher.messages()
        assert run.wait() == 0, run.messages()
        assert "finished" in run.messages()
        assert run.result()["stopped_cleanly"]


def test_a_robot_that_starts_first_and_a_learner_that_never_comes_back(tmp_path: Path) -> None:
    limits = ("--set", "link.wait_s=3")
    with robot(tmp_path, *distant("ws://127.0.0.1:1", "remote-local", *limits), quick=QUICK_ROBOT) as alone:
        assert alone.wait() == 3
        assert "no learner at ws://127.0.0.1:1" in alone.messages()
    with (
        learner(tmp_path, name="-learner") as teacher,
        robot(
            tmp_path, *distant(teacher.url, "remote-local", *limits, "--set", "link.drain_s=1"), quick=QUICK_ROBOT
        ) as run,
    ):
        run.wait_for_steps(10)
        teacher.kill()
        assert run.wait() == 5, run.messages()
        assert run.result()["stopped_cleanly"]


def test_a_robot_that_is_killed_comes_back_as_a_new_run(tmp_path: Path) -> None:
    with learner(tmp_path, name="-learner") as teacher:
        for attempt in ("killed", "whole"):
            (tmp_path / attempt).mkdir()
            with robot(
                tmp_path / attempt, *distant(teacher.url, "remote-local", "--steps", "120"), quick=QUICK_ROBOT
            ) as run:
                if attempt == "killed":
                    run.wait_for_steps(40)
                    run.kill()
                else:
                    assert run.wait() == 0, run.messages()
                    audited(tmp_path / attempt, run, teacher.run_folder)
        assert teacher.process.poll() is None
        teacher.process.send_signal(signal.SIGINT)
        assert teacher.wait() == 130
        assert teacher.result()["steps"] > 120


@pytest.mark.parametrize("mode", REMOTE)
def test_a_cable_that_is_pulled(tmp_path: Path, mode: str) -> None:
    """In two network namespaces: packets are lost without a word, as out of a WiFi's reach."""
    with cable() as wire:
        if wire is None:
            pytest.skip("this machine has no network namespaces for its users")
        token = tmp_path / "token"
        token.write_text("between these two only")
        token.chmod(0o600)
        with learner(
            *(tmp_path, "--token-file", str(token)), listen=f"{LEARNER_ADDRESS}:0", name="-learner", prefix=wire.learner
        ) as teacher:
            arguments = distant(teacher.url, mode, "--token-file", str(token), "--steps", "300")
            with robot(tmp_path, *arguments, quick=QUICK_ROBOT, prefix=wire.robot) as run:
                run.wait_for_steps(50)
                wire.set("down")
                time.sleep(3.0)
                wire.set("up")
                assert run.wait(120) == 0, run.messages()
                result = run.result()
                assert (result["steps"], result["stopped_cleanly"]) == (300, True)
                assert result["reconnects"] >= 1
                audited(tmp_path, run, teacher.run_folder)


def test_newer_policies_between_episodes_only(tmp_path: Path) -> None:
    often = ("--set", "learner.publish_every_s=0.2")
    arguments = ("--task", "track", "--policy-sync", "episode", "--steps", "420")
    with (
        learner(tmp_path, *often, name="-learner") as teacher,
        robot(tmp_path, *distant(teacher.url, "remote-local", *arguments), quick=()) as run,
    ):
        assert run.wait(90) == 0, run.messages()
        versions: dict[int, set[tuple[int, int]]] = {}
        for record in LogReader(find_log(teacher.run_folder)).iterate():
            if isinstance(record.message, Step) and record.message.policy_version != (0, 0):
                versions.setdefault(record.message.episode, set()).add(record.message.policy_version)
        if len(versions) < 2:
            pytest.skip("on this busy machine the worker made no policy in time")
        assert {len(seen) for seen in versions.values()} == {1}
        assert len(set.union(*versions.values())) > 1


def test_an_encrypted_link_with_jpeg_frames(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(LOCAL_CERT)
    key.write_text(LOCAL_KEY)
    with learner(tmp_path, "--cert", str(cert), "--key", str(key), name="-learner") as teacher:
        url = f"wss://localhost:{teacher.url.rpartition(':')[2]}"
        arguments = ("--steps", "60", "--image-codec", "jpeg")
        with robot(tmp_path, *distant(url, "remote-only", "--ca", str(cert), *arguments), quick=QUICK_ROBOT) as run:
            assert run.wait() == 0, run.messages()
            assert run.result()["uplink_bytes"] < 60 * 30_000
            audited(tmp_path, run, teacher.run_folder)
        with robot(tmp_path, *distant(url, "remote-only"), quick=QUICK_ROBOT, name="-2") as mistrusting:
            assert mistrusting.wait() == 3
            assert "is not to be trusted" in mistrusting.messages()


def test_two_robots_of_one_name_and_two_of_two(tmp_path: Path) -> None:
    with learner(tmp_path, name="-learner") as teacher:
        arguments = distant(teacher.url, "remote-local", "--steps", "100")
        with robot(tmp_path, *arguments, quick=QUICK_ROBOT, name="-1") as first:
            first.wait_for_steps(5)
            with robot(tmp_path, *arguments, quick=QUICK_ROBOT, name="-2") as twin:
                assert twin.wait() == 3
                assert "--name" in twin.messages()
            with robot(tmp_path, *arguments, "--name", "other", quick=QUICK_ROBOT, name="-3") as other:
                assert (first.wait(), other.wait()) == (0, 0)
        teacher.process.send_signal(signal.SIGINT)
        assert teacher.wait() == 130
        assert {name: each["steps"] for name, each in teacher.result()["robots"].items()} == {"arm": 100, "other": 100}


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with learner(tmp_path, name="-1") as first:
        done = relod(tmp_path, "learner", "--listen", f"127.0.0.1:{first.url.rpartition(':')[2]}")
        assert done.returncode == 3
        assert "in use" in done.stderr


def test_one_robot_after_the_other_each_exploring_its_own_way(tmp_path: Path) -> None:
    """The first one's steps are all of the random ones, and none is left for an update: the second must not wait."""
    with learner(tmp_path, name="-learner") as teacher:
        for steps in ("20", "40"):
            arguments = distant(teacher.url, "remote-local", "--steps", steps)
            with robot(tmp_path, *arguments, quick=QUICK_ROBOT, name=f"-{steps}") as run:
                assert run.wait() == 0, run.messages()
        first: dict[int, list[float]] = {}
        for record in LogReader(find_log(teacher.run_folder)).iterate():
            if isinstance(record.message, Step):
                first.setdefault(record.stream, record.message.action.tolist())
        assert len(first) == 2
        assert first[0] != first[1]
