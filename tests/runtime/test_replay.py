"""The chunked replay against a list of transitions: whatever is written, each is offered once and unmixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relod.algos.augment import gather_windows
from relod.algos.batch import Batch, Window, centre_window, shift_window
from relod.runtime import sampler
from relod.runtime.replay import ReplayLayout, ReplayNews, ReplaySampler, ReplayTable, ReplayWriter
from relod.types import EpisodeEnd, Step, TaskSpec

HW = (2, 3)
GAMMA = 0.5  # sums of powers of two are exact
CREATE = TaskSpec(
    name="create",
    robot="none",
    cycle_ns=45_000_000,
    frames=3,
    camera_hw=(120, 160),
    camera_fps=30.0,
    image_hw=(120, 160),
    proprio_names=tuple(f"p{i}" for i in range(8)),
    action_names=("left", "right"),
    max_steps=1000,
    sensor_window=1,
)


def picture(frame_id: int) -> np.ndarray:
    image = np.zeros((*HW, 3), np.uint8)
    image[...] = (frame_id % 256, frame_id // 256 % 256, frame_id // 65536)
    return image


def frame_id_of(image: np.ndarray) -> int:
    assert (image == image[0, 0]).all(), "a mixed image"
    blue, green, red = (int(value) for value in image[0, 0])
    return blue + 256 * green + 65536 * red


def make_layout(**changes: int | float) -> ReplayLayout:
    values: dict[str, int | float] = {
        "capacity": 16,
        "frames": 2,
        "proprio_dim": 3,
        "action_dim": 1,
        "lookahead": 2,
        "frames_per_step": 1.5,
        "streams": 1,
        "chunk_steps": 8,
    }
    return ReplayLayout(image_hw=HW, **{**values, **changes})


@dataclass(frozen=True)
class Row:
    """What a step or a last observation was made of."""

    proprio: tuple[float, float, float]  # stream, episode, index
    frame_ids: tuple[int, ...]
    reward: float = 0.0
    terminated: bool = False


@dataclass
class NaiveStream:
    """One robot's camera, and all it ever wrote: finished runs of rows, each ending in an observation."""

    number: int
    lookahead: int
    next_frame: int
    open: list[Row] = field(default_factory=list)
    finished: list[list[Row]] = field(default_factory=list)
    episode: int = 0
    sent: tuple[int, ...] = ()

    def observe(self, new_frames: int, count: int) -> tuple[tuple[int, ...], Mapping[int, np.ndarray]]:
        """The next observation's frames, and those not sent with the previous row."""
        self.next_frame += new_frames
        ids = tuple(range(self.next_frame - count + 1, self.next_frame + 1))
        news = {number: picture(number) for number in ids if number not in self.sent}
        self.sent = ids
        return ids, news

    def transitions(self, n_step: int) -> list[tuple[object, ...]]:
        """All that must be on offer, oldest first."""
        found: list[tuple[object, ...]] = []
        for rows in self.finished:
            found += [transition(rows, i, n_step) for i in range(len(rows) - 1)]
        full = range(max(0, len(self.open) - self.lookahead))  # in the open episode only full windows
        return found + [transition(self.open, i, n_step) for i in full]


def transition(rows: list[Row], i: int, n_step: int) -> tuple[object, ...]:
    last = min(i + n_step, len(rows) - 1)
    total, discount, dead = 0.0, 1.0, False
    for row in rows[i:last]:
        total += discount * row.reward
        discount *= GAMMA
        dead = dead or row.terminated
    here, there = rows[i], rows[last]
    return (here.proprio, here.frame_ids, total, 0.0 if dead else discount, there.proprio, there.frame_ids)


class Everything:
    """Stands in for a generator: draws every transition once, and the first corner."""

    def integers(self, low, high, size):
        return np.arange(low, high) if np.isscalar(low) else np.broadcast_to(low, size).copy()


def offered(sampler: ReplaySampler, n_step: int) -> list[tuple[object, ...]]:
    if not len(sampler):
        return []
    batch = sampler.sample(len(sampler), n_step=n_step, gamma=GAMMA, window=centre_window(HW), rng=Everything())
    return [
        (
            tuple(batch.proprio[i].tolist()),
            tuple(frame_id_of(image) for image in batch.images[i]),
            float(batch.rewards[i]),
            float(batch.discounts[i]),
            tuple(batch.next_proprio[i].tolist()),
            tuple(frame_id_of(image) for image in batch.next_images[i]),
        )
        for i in range(len(batch.rewards))
    ]


class Bench:
    """A writer, a sampler and the naive record of the same history."""

    def __init__(self, layout: ReplayLayout) -> None:
        self.layout = layout
        self.table = ReplayTable(layout)
        self.writer = ReplayWriter(self.table)
        self.sampler = ReplaySampler(self.table)
        self.streams = [NaiveStream(number, layout.lookahead, 1000 * (number + 1)) for number in range(layout.streams)]

    def step(self, stream: int = 0, new_frames: int = 1, terminated: bool = False) -> None:
        naive = self.streams[stream]
        ids, news = naive.observe(new_frames, self.layout.frames)
        row = Row(
            proprio=(float(stream), float(naive.episode), float(len(naive.open))),
            frame_ids=ids,
            reward=float(self.writer.env_steps % 7),
            terminated=terminated,
        )
        naive.open.append(row)
        self.sampler.apply(self.writer.append(make_step(row), news, stream))

    def close(self, stream: int = 0, new_frames: int = 1) -> None:
        naive = self.streams[stream]
        ids, news = naive.observe(new_frames, self.layout.frames)
        row = Row(proprio=(float(stream), float(naive.episode), -1.0), frame_ids=ids)
        if naive.open:
            naive.finished.append([*naive.open, row])
        else:
            naive.sent = ()  # an episode without steps leaves nothing, not even frames
        self._forget(naive)
        self.sampler.apply(self.writer.close_episode(make_end(row), news, stream))

    def abandon(self, stream: int = 0) -> None:
        naive = self.streams[stream]
        naive.finished.append(list(naive.open))
        self._forget(naive)
        self.sampler.apply(self.writer.abandon(stream))

    def _forget(self, naive: NaiveStream) -> None:
        naive.open, naive.episode = [], naive.episode + 1

    def expected(self, n_step: int) -> list[tuple[object, ...]]:
        return [t for stream in self.streams for t in stream.transitions(n_step)]


def make_step(row: Row) -> Step:
    return Step(
        episode=int(row.proprio[1]),
        index=int(row.proprio[2]),
        frame_ids=row.frame_ids,
        proprio=np.array(row.proprio, np.float32),
        action=np.array([row.reward / 8], np.float32),
        reward=row.reward,
        terminated=row.terminated,
        truncated=False,
        extras=np.zeros(0, np.float32),
        policy_version=(0, 0),
        observed_ns=0,
        acted_ns=0,
    )


def make_end(row: Row) -> EpisodeEnd:
    return EpisodeEnd(
        episode=int(row.proprio[1]),
        length=0,
        frame_ids=row.frame_ids,
        proprio=np.array(row.proprio, np.float32),
        return_=0.0,
        terminated=False,
        success=False,
        reason="",
        observed_ns=0,
    )


EVENTS = st.lists(
    st.tuples(st.sampled_from(["step"] * 12 + ["terminate", "close", "abandon"]), st.integers(0, 2), st.integers(0, 3)),
    max_size=120,
)


def play(bench: Bench, events: list[tuple[str, int, int]]) -> None:
    for kind, stream, new_frames in events:
        stream %= bench.layout.streams
        if kind == "abandon":
            bench.abandon(stream)
        elif kind == "close":
            bench.close(stream, new_frames)
        else:
            bench.step(stream, new_frames, terminated=kind == "terminate")
            if kind == "terminate":
                bench.close(stream, new_frames)


@settings(max_examples=50, deadline=None)
@given(events=EVENTS, lookahead=st.integers(1, 4), frames=st.integers(1, 3), streams=st.integers(1, 3))
def test_everything_written_is_offered_exactly_once(events, lookahead, frames, streams):
    bench = Bench(make_layout(capacity=2048, lookahead=lookahead, frames=frames, streams=streams))
    play(bench, events)
    for n_step in range(1, lookahead + 1):
        assert sorted(offered(bench.sampler, n_step)) == sorted(bench.expected(n_step))


@settings(max_examples=50, deadline=None)
@given(events=EVENTS, lookahead=st.integers(1, 4), streams=st.integers(1, 3))
def test_after_eviction_what_is_left_is_still_true_and_the_newest(events, lookahead, streams):
    bench = Bench(make_layout(capacity=16, lookahead=lookahead, streams=streams))
    play(bench, events * 2)
    left, expected = offered(bench.sampler, lookahead), bench.expected(lookahead)
    assert len(set(left)) == len(left)
    assert set(left) <= set(expected)
    if streams == 1:
        assert left == expected[len(expected) - len(left) :]


@settings(max_examples=30, deadline=None)
@given(events=EVENTS, lookahead=st.integers(1, 3))
def test_a_new_worker_is_told_everything_again_in_the_same_order(events, lookahead):
    bench = Bench(make_layout(lookahead=lookahead))
    play(bench, events)
    late = ReplaySampler(bench.table)
    late.apply(bench.writer.reissue())
    assert offered(late, lookahead) == offered(bench.sampler, lookahead)
    assert late.env_steps == bench.writer.env_steps


def test_capacity_is_kept_and_chunks_go_round():
    bench = Bench(make_layout(capacity=64, frames_per_step=1.0))
    for _ in range(1000):
        bench.step()
        if bench.writer.env_steps > 100:
            assert 64 <= len(bench.sampler) <= 64 + 2 * 8
    assert offered(bench.sampler, 2)[-1][0] == (0.0, 0.0, 997.0)


def test_a_window_stops_at_termination_and_bootstraps_at_a_truncation():
    bench = Bench(make_layout(capacity=64, lookahead=3))
    for terminated in (True, False):
        for number in range(4):
            bench.step(terminated=terminated and number == 3)
        bench.close()
    discounts = [row[3] for row in offered(bench.sampler, 3)]
    assert discounts == [0.125, 0.0, 0.0, 0.0, 0.125, 0.125, 0.25, 0.5]


def test_an_abandoned_episode_leaves_only_known_next_observations():
    bench = Bench(make_layout(capacity=64, lookahead=3))
    for _ in range(3):
        bench.step()
    bench.abandon()
    left = offered(bench.sampler, 3)
    assert [row[4] for row in left] == [(0.0, 0.0, 2.0), (0.0, 0.0, 2.0)]
    bench.step()
    bench.abandon()  # one lone step: nothing is known after it
    assert len(offered(bench.sampler, 3)) == 2


def test_more_frames_than_planned_end_a_chunk_early_and_lose_nothing():
    bench = Bench(make_layout(capacity=256, frames_per_step=1.0, frames=3))
    for _ in range(100):
        bench.step(new_frames=3)
    assert offered(bench.sampler, 2) == bench.expected(2)


def test_draws_from_an_overwritten_chunk_are_made_again():
    bench = Bench(make_layout(capacity=16))
    for _ in range(20):
        bench.step()
    behind = ReplaySampler(bench.table)
    behind.apply(bench.writer.reissue())
    for _ in range(12):  # evicts the oldest chunk while `behind` hears nothing
        bench.step()
    rng = np.random.default_rng(0)
    truth = {row[0]: row for row in bench.expected(2)}
    for _ in range(20):
        batch = behind.sample(32, n_step=2, gamma=GAMMA, window=centre_window(HW), rng=rng)
        for i in range(32):
            row = truth[tuple(batch.proprio[i].tolist())]
            assert tuple(frame_id_of(image) for image in batch.images[i]) == row[1]
            assert float(batch.rewards[i]) == row[2]
    assert behind.redrawn > 0


def test_a_replay_overwritten_altogether_says_so():
    bench = Bench(make_layout(capacity=16))
    for _ in range(20):
        bench.step()
    behind = ReplaySampler(bench.table)
    behind.apply(bench.writer.reissue())
    for _ in range(100):
        bench.step()
    with pytest.raises(ValueError, match="no transition"):
        behind.sample(4, n_step=1, gamma=GAMMA, window=centre_window(HW), rng=np.random.default_rng(0))


def test_sampling_is_uniform_and_repeats_with_its_generator():
    bench = Bench(make_layout(capacity=64))
    for _ in range(43):
        bench.step()
    draws = []
    for seed in (1, 1):
        rng = np.random.default_rng(seed)
        batch = bench.sampler.sample(8000, n_step=2, gamma=GAMMA, window=shift_window(HW, 1), rng=rng)
        draws.append((batch.proprio.copy(), batch.images.copy()))
    assert np.array_equal(draws[0][0], draws[1][0])
    assert np.array_equal(draws[0][1], draws[1][1])
    _, counts = np.unique(draws[0][0][:, 2], return_counts=True)
    assert len(counts) == 41
    assert counts.min() > 120  # 195 expected, standard deviation 14


@pytest.mark.parametrize("window", [centre_window(HW), shift_window(HW, 1)], ids=["whole", "shift"])
def test_threads_and_staging_give_the_same_windows(window, monkeypatch):
    monkeypatch.setattr(sampler, "PART_BYTES", 32)
    bench = Bench(make_layout(capacity=64))
    bench.step()
    for number in range(60):
        bench.step(new_frames=number % 3)
    others = {"three threads": {"threads": 3}, "staged": {"staged": True}, "both": {"threads": 2, "staged": True}}
    expected = draw(bench.sampler, window, seed=5)
    for name, options in others.items():
        other = ReplaySampler(bench.table, **options)
        other.apply(bench.writer.reissue())
        batch = draw(other, window, seed=5)
        for kind in ("images", "next_images"):
            images = getattr(batch, kind)
            if "staged" in options:
                frames, corners = torch.from_numpy(images), torch.from_numpy(batch.corners)
                images = gather_windows(frames, corners, window.out_hw).numpy()
            assert np.array_equal(images, getattr(expected, kind)), name
        assert np.array_equal(batch.rewards, expected.rewards)
        assert np.array_equal(batch.next_proprio, expected.next_proprio)


def draw(sampler: ReplaySampler, window: Window, seed: int) -> Batch:
    return sampler.sample(50, n_step=2, gamma=GAMMA, window=window, rng=np.random.default_rng(seed))


def test_staged_batches_take_turns_and_wait_for_their_reader():
    bench = Bench(make_layout(capacity=64))
    for _ in range(20):
        bench.step()
    sampler = ReplaySampler(bench.table, staged=True)
    sampler.apply(bench.writer.reissue())
    first = draw(sampler, centre_window(HW), seed=1)
    pictures = first.images.copy()
    unfinished = Reader(lambda: np.array_equal(first.images, pictures))
    first.fence.raise_until(unfinished)
    second = draw(sampler, centre_window(HW), seed=2)
    assert not np.shares_memory(first.images, second.images)
    assert unfinished.waits == []
    assert np.shares_memory(draw(sampler, centre_window(HW), seed=3).images, first.images)
    assert unfinished.waits == [True]  # waited for once, before anything was written
    assert not np.array_equal(first.images, pictures)
    draw(sampler, centre_window(HW), seed=4)
    draw(sampler, centre_window(HW), seed=5)
    assert unfinished.waits == [True]


def test_memory_of_another_size_is_given_up_only_when_its_reader_is_done():
    bench = Bench(make_layout(capacity=64))
    for _ in range(20):
        bench.step()
    batch = draw(bench.sampler, centre_window(HW), seed=1)
    unfinished = Reader(lambda: True)
    batch.fence.raise_until(unfinished)
    bench.sampler.sample(7, n_step=1, gamma=GAMMA, window=centre_window(HW), rng=np.random.default_rng(0))
    assert unfinished.waits == [True]


class Reader:
    """A device's copy that is done when it is waited for; notes what it saw then."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self.waits: list[bool] = []
        self._look = look

    def synchronize(self) -> None:
        self.waits.append(self._look())


def test_a_step_of_the_create_takes_at_most_85_kilobytes():
    for lookahead in (1, 3):
        layout = ReplayLayout.for_task(CREATE, capacity=100_000, lookahead=lookahead)
        assert layout.nbytes / layout.capacity <= 85_000
    small = make_layout()
    table = ReplayTable(small)
    assert small.nbytes == table.frames.nbytes + table.rows.nbytes + table.generations.nbytes


def test_a_camera_at_its_rate_fills_a_chunk_with_all_its_steps():
    layout = ReplayLayout.for_task(CREATE, capacity=512, lookahead=3)
    frames = math.ceil(layout.chunk_steps * CREATE.camera_fps * CREATE.cycle_ns / 1e9)
    repeated = (layout.lookahead + 1) * CREATE.frames  # of the rows copied in, and the chunk's first stack
    assert layout.slots >= frames + repeated


def test_a_released_streams_chunk_can_be_evicted():
    bench = Bench(make_layout(capacity=16, streams=2))
    bench.step(stream=1)
    bench.step(stream=1)
    bench.sampler.apply(bench.writer.release(1))
    for _ in range(100):
        bench.step()
    assert all(row[0][0] == 0.0 for row in offered(bench.sampler, 1))


def test_wrong_use_is_refused():
    bench = Bench(make_layout())
    row = Row(proprio=(0.0, 0.0, 0.0), frame_ids=(1, 2))
    with pytest.raises(ValueError, match="frame 2"):
        bench.writer.append(make_step(row), {1: picture(1)})
    with pytest.raises(ValueError, match="no transition"):
        bench.sampler.sample(1, n_step=1, gamma=0.9, window=centre_window(HW), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="n_step is 3"):
        bench.sampler.sample(1, n_step=3, gamma=0.9, window=centre_window(HW), rng=np.random.default_rng(0))


@given(
    st.lists(
        st.builds(
            ReplayNews,
            chunk=st.integers(0, 2**32 - 1),
            generation=st.integers(0, 2**64 - 1),
            start=st.integers(0, 2**16 - 1),
            stop=st.integers(0, 2**16 - 1),
            env_steps=st.integers(0, 2**64 - 1),
        ),
        max_size=5,
    )
)
def test_news_survive_packing_and_joining(news):
    assert list(ReplayNews.unpack(b"".join(one.pack() for one in news))) == news
