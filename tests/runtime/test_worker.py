"""The update worker: its schedule, its loop under virtual time, its checkpoints, and the whole process."""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relod.algos.agent import flatten_policy, policy_size
from relod.algos.sac import SAC, SacSettings
from relod.config import LearnerSettings
from relod.errors import SettingsError, StartError
from relod.runtime.clock import NS_PER_MS, NS_PER_S, VirtualClock, monotonic_ns
from relod.runtime.policy import PolicyBox, PolicyReader
from relod.runtime.replay import ReplayLayout, ReplaySampler, ReplayTable, ReplayWriter
from relod.runtime.worker import (
    LearnerLoop,
    NewsSender,
    UpdateSchedule,
    WorkerJob,
    WorkerStatus,
    newest_checkpoint,
    read_checkpoint,
    run_worker,
    write_checkpoint,
)
from relod.types import Step, TaskSpec

torch.set_num_threads(1)  # networks of this size are slower on two

HW = (20, 24)
SPEC = TaskSpec(
    name="small",
    robot="none",
    cycle_ns=45_000_000,
    frames=2,
    camera_hw=HW,
    camera_fps=20.0,
    image_hw=HW,
    proprio_names=("p",),
    action_names=("a",),
    max_steps=100,
    sensor_window=1,
)
AGENT = SacSettings(
    conv_channels=4,
    conv_strides=(2, 1),
    hidden=(16,),
    shift_px=1,
    batch_size=8,
    init_steps=20,
    max_updates_per_step=0.5,
    actor_every=1,
)


def make_table() -> ReplayTable:
    return ReplayTable(ReplayLayout.for_task(SPEC, capacity=512, lookahead=AGENT.n_step))


def write_steps(writer: ReplayWriter, first: int, count: int) -> bytes:
    rng = np.random.default_rng(first)
    news = b""
    for number in range(first, first + count):
        step = Step(
            episode=0,
            index=number,
            frame_ids=(number, number + 1),
            proprio=rng.standard_normal(1).astype(np.float32),
            action=rng.uniform(-1, 1, 1).astype(np.float32),
            reward=-1.0,
            terminated=False,
            truncated=False,
            extras=np.zeros(0, np.float32),
            policy_version=(0, 0),
            observed_ns=0,
            acted_ns=0,
        )
        images = {frame: np.full((*HW, 3), frame % 256, np.uint8) for frame in step.frame_ids}
        news += writer.append(step, images)
    return news


class Run:
    """A loop under virtual time, with the policies it published."""

    def __init__(self, seed: int = 0, epoch: int = 1) -> None:
        table = make_table()
        self.writer = ReplayWriter(table)
        self.clock = VirtualClock()
        self.published: list[tuple[int, int]] = []
        self.loop = LearnerLoop(
            SAC.build_learner(SPEC, AGENT, seed=seed, device=torch.device("cpu")),
            ReplaySampler(table),
            SAC.needs(SPEC, AGENT),
            epoch=epoch,
            seed=seed,
            publish=lambda flat, version: self.published.append(version),
            publish_every_s=1.0,
            clock=self.clock,
        )

    def steps(self, count: int) -> int:
        done = 0
        for _ in range(count):
            self.loop.sampler.apply(write_steps(self.writer, self.writer.env_steps, 1))
            self.clock.advance_to(self.clock.now_ns() + SPEC.cycle_ns)
            done += self.loop.run_updates()
        return done

    def weights(self) -> np.ndarray:
        return flatten_policy(self.loop.learner.policy())


@given(
    cap=st.floats(0.01, 10), init_steps=st.integers(0, 100), env_steps=st.integers(0, 1000), updates=st.integers(0, 500)
)
def test_the_schedule_never_passes_its_cap_and_always_reaches_it(cap, init_steps, env_steps, updates):
    schedule = UpdateSchedule(cap, init_steps)
    due = schedule.due(env_steps, updates)
    earned = cap * max(0, env_steps - init_steps)
    assert due >= 0
    assert due == 0 or updates + due <= earned + 1e-6
    assert updates + due > earned - 1


def test_updates_follow_the_steps_under_virtual_time():
    run = Run()
    assert run.steps(20) == 0
    assert run.steps(40) == 20
    assert run.loop.updates == 20


def test_the_first_policy_comes_with_the_first_update_then_once_a_second():
    run = Run()
    run.steps(22)
    assert run.published == [(1, 1)]
    run.steps(50)  # 2.25 s, an update every second cycle: the first one after a second is 24 cycles later
    assert run.published == [(1, 1), (1, 13), (1, 25)]
    run.loop.publish_policy()
    run.loop.publish_policy()
    assert run.published[-1] == (1, run.loop.updates)
    assert len(run.published) == len(set(run.published))


def test_a_limit_on_updates_is_kept():
    run = Run()
    run.loop.sampler.apply(write_steps(run.writer, 0, 60))
    assert run.loop.run_updates(limit=3) == 3
    assert run.loop.due() == 17


def test_same_seed_same_weights():
    weights = []
    for seed in (0, 0, 1):
        run = Run(seed)
        run.steps(40)
        weights.append(run.weights())
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path):
    straight, first, second = Run(), Run(), Run(seed=5, epoch=2)
    straight.steps(60)
    first.steps(40)
    write_checkpoint(tmp_path, first.loop.checkpoint())
    second.loop.resume(read_checkpoint(newest_checkpoint(tmp_path)))
    for _ in range(40):  # the replay is rebuilt from the experience log, without updates
        second.loop.sampler.apply(write_steps(second.writer, second.writer.env_steps, 1))
    assert second.loop.due() == 0
    second.steps(20)
    assert second.loop.updates == straight.loop.updates
    assert np.array_equal(second.weights(), straight.weights())
    assert second.published[0][0] == 2


def test_checkpoints_are_whole_and_old_ones_go(tmp_path: Path):
    run = Run()
    assert newest_checkpoint(tmp_path) is None
    for _ in range(4):
        run.steps(30)
        path = write_checkpoint(tmp_path, run.loop.checkpoint())
        assert newest_checkpoint(tmp_path) == path
    assert len(list(tmp_path.iterdir())) == 2
    assert read_checkpoint(path).counters["env_steps"] == 120


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path):
    run = Run()
    run.steps(22)
    path = write_checkpoint(tmp_path, run.loop.checkpoint())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StartError, match="checkpoint"):
        read_checkpoint(path)
    with pytest.raises(StartError, match="checkpoint"):
        read_checkpoint(tmp_path / "nothing.safetensors")
    path.write_bytes(data)
    other = SAC.build_learner(SPEC, msgspec.structs.replace(AGENT, hidden=(8,)), seed=0, device=torch.device("cpu"))
    with pytest.raises(SettingsError, match="another network"):
        other.load_state(read_checkpoint(path).tensors)


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
    resume: Path | None = None
    for epoch in (1, 2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job = make_job(tmp_path, theirs, table, box, epoch=epoch, resume=resume)
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
        resume = newest_checkpoint(tmp_path)
        assert resume is not None
        assert read_checkpoint(resume).counters["updates"] == status.updates
        assert reader.poll()
        assert reader.version == (epoch, status.updates)
        assert np.isfinite(reader.module).all()
