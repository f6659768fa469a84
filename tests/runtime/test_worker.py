"""The update worker's process: it learns, publishes, goes on after its death, goes back once, and ends in order."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import select
import socket
from pathlib import Path

import msgspec
import numpy as np
import pytest

from relod.algos.agent import policy_size
from relod.algos.sac import SAC
from relod.config import LearnerSettings
from relod.errors import EXIT_SAFETY, SafetyStop
from relod.runtime.checkpoint import newest_readable, write_checkpoint
from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from relod.runtime.policy import PolicyBox, PolicyReader, PolicyWriter
from relod.runtime.processes import Supervisor
from relod.runtime.replay import ReplayTable, ReplayWriter
from relod.runtime.worker import NewsSender, WorkerJob, WorkerStatus, _Worker, run_worker
from tests.runtime.smallrun import AGENT, SPEC, Run, make_table, write_steps


def test_news_wait_for_a_busy_worker_and_arrive_in_order():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        sender = NewsSender(ours)
        sent = np.arange(300_000, dtype="<u8").reshape(-1, 3)  # 24 bytes a record
        for record in np.array_split(sent, 50):
            sender.send(record.tobytes())
        assert not sender.flush()
        got = b""
        while len(got) < sent.nbytes:
            packet = theirs.recv(1 << 20)
            assert len(packet) % 24 == 0
            got += packet
            sender.flush()
        assert got == sent.tobytes()


def make_job(tmp_path: Path, link: socket.socket, table: ReplayTable, box: PolicyBox, **changes: object) -> WorkerJob:
    values: dict[str, object] = {
        "algorithm": "relod.algos.sac:SAC",
        "spec": SPEC,
        "settings": LearnerSettings(device="cpu", threads=1, publish_every_s=0.05),
        "agent": AGENT,
        "seed": 0,
        "epoch": 1,
        "replay": table,
        "box": box,
        "link": link,
        "checkpoints": tmp_path,
    }
    return WorkerJob(**{**values, **changes})


def test_the_first_policy_is_in_a_checkpoint_at_once(tmp_path: Path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    run = Run()
    for _ in range(AGENT.init_steps + 10):
        run.pass_step()
    found: list[list[int]] = []

    def stop() -> bool:
        found.append(sorted(int(path.stem.removeprefix("learner-")) for path in tmp_path.glob("*.safetensors")))
        return len(found) == 4

    with ours, theirs:
        _Worker(make_job(tmp_path, theirs, make_table(), PolicyBox(1)), run.loop).run(stop)
        assert found == [[], [1], [1], [1]]  # the next one comes with learner.checkpoint_every_s
        assert newest_readable(tmp_path).checkpoint is not None
        found.clear()
        _Worker(make_job(tmp_path, theirs, make_table(), PolicyBox(1)), run.loop).run(stop)
        assert found == [[1, 3]] * 4  # it went on with a policy that a checkpoint has


def receive_status(link: socket.socket, deadline_ns: int) -> WorkerStatus:
    poll = select.poll()
    poll.register(link, select.POLLIN)
    assert poll.poll(max(0, deadline_ns - monotonic_ns()) / NS_PER_MS), "no status in time"
    return msgspec.msgpack.decode(link.recv(1 << 16), type=WorkerStatus)


@pytest.mark.slow
def test_a_worker_process_learns_publishes_and_goes_on_after_its_death(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    deadline_ns = monotonic_ns() + 50 * NS_PER_S
    table, box = make_table(), PolicyBox(policy_size(SAC.build_actor(SPEC, AGENT)))
    reader = PolicyReader(box, lambda flat: flat)
    writer = ReplayWriter(table)
    write_steps(writer, 0, 100)  # before the worker starts: all news come with the reissue
    for epoch in (1, 2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job = make_job(tmp_path, theirs, table, box, epoch=epoch, extra={"epoch": epoch})
        process = context.Process(target=run_worker, args=(job,), daemon=True)
        process.start()
        theirs.close()
        sender = NewsSender(ours)
        sender.send(writer.reissue())
        sender.send(write_steps(writer, writer.env_steps, 20))
        status = receive_status(ours, deadline_ns)
        while status.updates < (writer.env_steps - AGENT.init_steps) // 2:
            status = receive_status(ours, deadline_ns)
        assert status.epoch == epoch
        assert status.replay_steps == writer.env_steps - AGENT.n_step
        assert set(status.metrics) == {"critic_loss", "q_mean", "actor_loss", "alpha", "entropy"}
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        ours.close()  # the parent is gone
        process.join(20)
        assert process.exitcode == 0
        checkpoint = newest_readable(tmp_path).checkpoint
        assert checkpoint is not None
        assert checkpoint.counters["updates"] == status.updates
        assert checkpoint.counters["extra"] == {"epoch": epoch}
        assert reader.poll()
        assert reader.version == (epoch, status.updates)
        assert np.isfinite(reader.module).all()


@pytest.mark.slow
def test_a_worker_that_diverges_goes_back_once_then_ends_the_run(tmp_path: Path):
    """It finds the newest checkpoint damaged, and draws rewards that are not finite."""
    earlier = Run()
    for _ in range(2):
        earlier.steps(40)
        newest = write_checkpoint(tmp_path, earlier.loop.checkpoint())
    newest.write_bytes(newest.read_bytes()[:-1])
    table, box = make_table(), PolicyBox(policy_size(SAC.build_actor(SPEC, AGENT)))
    PolicyWriter(box).publish(earlier.weights(), (5, 30))  # of a worker that died after it had gone back
    reader = PolicyReader(box, lambda flat: flat)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    writer = ReplayWriter(table)
    sender = NewsSender(ours)
    sender.send(write_steps(writer, 0, 120, reward=math.nan))
    events: list[str] = []
    supervisor = Supervisor(
        log_path=tmp_path / "children.log",
        max_restarts=5,
        on_event=lambda name, text: events.append(text),
        on_report=lambda name, values: None,
    )

    async def scenario() -> None:
        child = supervisor.start(
            "worker",
            "relod.runtime.worker:run_worker_process",
            lambda: make_job(tmp_path, theirs, table, box),
            restart=True,
        )
        async with supervisor.watching(), asyncio.timeout(50):
            await supervisor.failed.wait()
        assert child.starts == 1

    try:
        asyncio.run(scenario())
    finally:
        supervisor.close()
        ours.close()
        theirs.close()
    assert isinstance(supervisor.failure, SafetyStop)
    assert supervisor.failure.exit_code == EXIT_SAFETY
    assert "critic_loss is nan again at update" in supervisor.failure.message
    assert events[0].endswith("learner-000000010.safetensors instead")
    assert "critic_loss is nan at update" in events[-1]
    assert events[-1].endswith("went back to the checkpoint of update 10")
    assert reader.poll()
    assert reader.version == (7, 10)  # above what the dead worker published, and once more for going back
    assert np.isfinite(reader.module).all()
    assert [path.name for path in tmp_path.glob("*.safetensors")].count("learner-000000010.safetensors") == 1
