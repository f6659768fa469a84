"""Rollouts out of the replay's memory: whole episodes of one policy, in order, whatever chunks they lie in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relod.runtime.replay import ReplayLayout, ReplayTable, ReplayWriter
from relod.runtime.rollout import RolloutReader
from relod.types import EpisodeEnd, Step

HW = (3, 4)
LAYOUT = ReplayLayout(
    capacity=64,
    image_hw=HW,
    frames=2,
    proprio_dim=1,
    action_dim=1,
    lookahead=1,
    frames_per_step=1.0,
    streams=2,
    chunk_steps=8,
    extras_dim=2,
)


class Bench:
    """A writer and a reader of one table. An observation's value is in its vector and in its newest frame."""

    def __init__(self, earlier_steps: int = 0) -> None:
        table = ReplayTable(LAYOUT)
        self.writer, self.reader = ReplayWriter(table), RolloutReader(table, earlier_steps)
        self.value = 0

    def images(self, *values: int) -> dict[int, np.ndarray]:
        return {value: np.full((*HW, 3), value % 256, np.uint8) for value in values}

    def episode(
        self, episode: int, length: int, version: tuple[int, int], *, stream: int = 0, end: str = "time"
    ) -> list:
        """Append one; returns what a rollout must say of its steps: (value, reward, terminated, ends)."""
        told = []
        for index in range(length):
            self.value += 1
            last = index == length - 1
            step = Step(
                episode=episode,
                index=index,
                frame_ids=(self.value - 1, self.value),
                proprio=np.array([self.value], np.float32),
                action=np.array([self.value / 1000], np.float32),
                reward=float(self.value),
                terminated=last and end == "goal",
                truncated=last and end == "time",
                extras=np.array([self.value, -self.value], np.float32),
                policy_version=version,
                observed_ns=0,
                acted_ns=0,
            )
            self.reader.apply(self.writer.append(step, self.images(self.value - 1, self.value), stream))
            told.append((self.value, float(self.value), step.terminated, last))
        if end == "cut":
            self.reader.apply(self.writer.abandon(stream))
            return []
        self.value += 1
        over = EpisodeEnd(
            episode=episode,
            length=length,
            frame_ids=(self.value - 1, self.value),
            proprio=np.array([self.value], np.float32),
            return_=0.0,
            terminated=end == "goal",
            success=False,
            reason=end,
            observed_ns=0,
        )
        self.reader.apply(self.writer.close_episode(over, self.images(self.value - 1, self.value), stream))
        return told

    def take(self, version: tuple[int, int], *, earlier: int = 0) -> list:
        rollout = self.reader.take(version)
        assert rollout.earlier == earlier
        steps = len(rollout.rewards)
        values = rollout.proprio[:, 0].astype(int).tolist()
        seen = rollout.look(np.arange(len(values)))
        assert seen[:, -1, 0, 0, 0].tolist() == [value % 256 for value in values]
        assert seen[:, 0, 0, 0, 0].tolist() == [(value - 1) % 256 for value in values]
        assert values[steps:] == [value + 1 for value, end in zip(values, rollout.ends, strict=False) if end]
        after = rollout.successors()
        assert [values[place] for place in after] == [value + 1 for value in values[:steps]]
        assert rollout.extras.tolist() == [[value, -value] for value in values[:steps]]
        assert rollout.actions[:, 0].tolist() == pytest.approx([value / 1000 for value in values[:steps]])
        return list(
            zip(
                values[:steps],
                rollout.rewards.tolist(),
                rollout.terminated.tolist(),
                rollout.ends.tolist(),
                strict=True,
            )
        )


def test_a_rollout_is_whole_episodes_of_one_policy_and_is_taken_once():
    bench = Bench()
    bench.episode(0, 3, (1, 0))
    told = [*bench.episode(1, 5, (1, 1), end="goal"), *bench.episode(2, 11, (1, 1))]  # over the end of a chunk
    assert bench.reader.ready((1, 1)) == 16
    assert bench.take((1, 1)) == told
    assert bench.reader.ready((1, 1)) == len(bench.reader) == 0
    with pytest.raises(ValueError, match="no whole episode"):
        bench.reader.take((1, 1))


def test_an_episode_that_is_not_over_or_was_cut_does_not_count():
    bench = Bench()
    bench.episode(0, 4, (1, 0), end="cut")
    bench.episode(1, 4, (1, 0))
    step = Step(
        episode=2,
        index=0,
        frame_ids=(1, 2),
        proprio=np.zeros(1, np.float32),
        action=np.zeros(1, np.float32),
        reward=0.0,
        terminated=False,
        truncated=False,
        extras=np.zeros(2, np.float32),
        policy_version=(1, 0),
        observed_ns=0,
        acted_ns=0,
    )
    bench.reader.apply(bench.writer.append(step, bench.images(1, 2)))
    assert bench.reader.ready((1, 0)) == 4


def test_a_step_without_extras_is_no_trouble():
    bench = Bench()
    step = Step(
        episode=0,
        index=0,
        frame_ids=(1, 2),
        proprio=np.zeros(1, np.float32),
        action=np.zeros(1, np.float32),
        reward=0.0,
        terminated=False,
        truncated=False,
        extras=np.zeros(0, np.float32),
        policy_version=(0, 0),
        observed_ns=0,
        acted_ns=0,
    )
    bench.reader.apply(bench.writer.append(step, bench.images(1, 2)))


def test_a_policy_that_goes_on_under_a_new_epoch_goes_on_with_its_rollout():
    bench = Bench()
    told = bench.episode(0, 3, (2, 5))
    bench.episode(1, 3, (2, 4))
    bench.reader.go_on(2)
    told += bench.episode(2, 3, (3, 5))
    assert bench.reader.ready((3, 5)) == 6
    assert bench.take((3, 5)) == told
    bench.episode(3, 3, (3, 6))
    assert bench.reader.ready((4, 6)) == 0  # only the rollout in which the run went on


def test_the_newest_whole_episodes_of_earlier_policies_come_first():
    bench = Bench(earlier_steps=10)
    bench.episode(0, 4, (0, 0))  # random actions
    bench.episode(1, 6, (1, 0))
    first = bench.episode(2, 4, (1, 0))
    bench.take((1, 0))
    bench.episode(3, 3, (1, 1), end="cut")
    second = bench.episode(4, 5, (1, 1))
    third = bench.episode(5, 5, (1, 2))
    assert bench.take((1, 2), earlier=9) == [*first, *second, *third]  # with the first one there would be 15
    fourth = bench.episode(6, 11, (1, 3))
    assert bench.take((1, 3), earlier=10) == [*second, *third, *fourth]
    fifth = bench.episode(7, 2, (1, 4))
    assert bench.take((1, 4)) == fifth  # the newest of the earlier ones is too long


def test_a_reader_that_begins_later_gives_the_same_earlier_steps():
    bench = Bench(earlier_steps=12)
    news = []
    apply = bench.reader.apply
    bench.reader.apply = lambda data: (news.append(data), apply(data))
    for updates in range(4):
        bench.episode(2 * updates, 4, (1, updates))
        bench.episode(2 * updates + 1, 3, (1, updates))
        assert bench.reader.ready((1, updates)) == 7
        bench.take((1, updates), earlier=(0, 7, 10, 10)[updates])
    told = bench.episode(8, 3, (1, 4))
    late = RolloutReader(bench.reader._table, 12)
    for data in news:
        late.apply(data)
    mine, others = bench.reader.take((1, 4)), late.take((1, 4))
    assert mine.proprio.tolist() == others.proprio.tolist()
    assert mine.earlier == others.earlier == 10
    assert [value for value, *_ in told] == mine.proprio[10:13, 0].astype(int).tolist()


def test_what_is_overwritten_is_forgotten():
    bench = Bench()
    for episode in range(40):
        bench.episode(episode, 5, (1, 0))
    assert LAYOUT.capacity <= bench.reader.ready((1, 0)) < LAYOUT.capacity + 3 * LAYOUT.chunk_steps
    assert len(bench.take((1, 0))) >= LAYOUT.capacity - 5
    bench = Bench(earlier_steps=40)
    for updates in range(100):
        bench.episode(updates, 5, (1, updates))
        bench.take((1, updates), earlier=min(40, 5 * updates))
    assert len(bench.reader._earlier) < LAYOUT.capacity + 3 * LAYOUT.chunk_steps


EPISODES = st.lists(
    st.tuples(st.integers(2, 12), st.integers(0, 1), st.sampled_from(["time", "goal", "cut"]), st.integers(1, 2)),
    min_size=1,
    max_size=5,
)


@given(EPISODES)
def test_rollouts_are_those_of_a_naive_reader(episodes):
    bench = Bench()
    told = {1: [], 2: []}
    for number, (length, stream, end, updates) in enumerate(episodes):
        told[updates].append((stream, bench.episode(number, length, (1, updates), stream=stream, end=end)))
    expected = [row for stream in (0, 1) for other, rows in told[2] for row in rows if other == stream]
    assert bench.reader.ready((1, 2)) == len(expected)
    if expected:
        assert bench.take((1, 2)) == expected
