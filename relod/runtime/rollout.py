"""Rollouts out of the replay's memory: whole episodes of one policy, in order, and of those before it if wanted.

The same table and news as for the sampler of minibatches; only what is done with them differs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..algos.batch import PIXEL, Rollout, copy_stacks
from .replaytable import ReplayNews, ReplayTable

__all__ = ["RolloutReader", "Version"]

Version = tuple[int, int]  # of a policy: epoch, updates


class RolloutReader:
    """Keeps the transitions of the newest policy and, for at most so many, of earlier ones; fed by `apply`.

    The table's lookahead is 1.
    """

    def __init__(self, table: ReplayTable, earlier_steps: int = 0) -> None:
        self.env_steps = 0
        self._earlier_steps = earlier_steps
        self._table, self._layout = table, table.layout
        self._rows = table.rows.reshape(-1)
        self._generations = np.zeros(self._layout.chunks, np.uint64)
        self._since: int | None = None  # an epoch from which on the newest policy has acted under other versions
        self._counted: tuple[Version, int] | None = None  # what `ready` said last, while nothing has come since
        self._waiting: list[int] = []  # chunk * rows + row, in the order of the news
        self._earlier: list[int] = []  # likewise, of earlier policies

    def __len__(self) -> int:
        """Transitions of the newest policy, as far as is known."""
        return len(self._waiting)

    def apply(self, data: bytes) -> None:
        """Take in news from the writer."""
        for news in ReplayNews.unpack(data):
            self.env_steps = max(self.env_steps, news.env_steps)
            if news.generation > self._generations[news.chunk]:
                self._generations[news.chunk] = news.generation
                self._waiting = self._outside(news.chunk, self._waiting)
                self._earlier = self._outside(news.chunk, self._earlier)
                self._counted = None
            first = news.chunk * self._layout.rows
            self._waiting.extend(range(first + news.start, first + news.stop))
            if self._rows["last"][first + news.start : first + news.stop].any():
                self._counted = None

    def go_on(self, epoch: int) -> None:
        """The policy of the next rollout has acted before under `epoch`, and since."""
        self._since, self._counted = epoch, None

    def ready(self, version: Version) -> int:
        """Steps of whole episodes by this policy. All others are earlier ones' from now on."""
        if self._counted is None or self._counted[0] != version:
            self._part_from_others(version)
            self._counted = version, len(self._whole(self._waiting))
        return self._counted[1]

    def take(self, version: Version) -> Rollout:
        """Whole episodes by this policy, after which they are an earlier one's; `ValueError` when there are none."""
        self._part_from_others(version)
        newest, self._since = self._whole(self._waiting), None
        if not len(newest):
            raise ValueError("no whole episode is there")
        earlier = self._newest_of_earlier()
        order = np.concatenate([earlier, newest])
        rows = self._rows[order]
        ends = rows["last"] != 0
        finals = self._rows[order[ends] + 1]
        observations = np.concatenate([order, order[ends] + 1])
        self._pass_on(np.array(self._waiting, np.int64))
        self._waiting, self._counted = [], None
        return Rollout(
            proprio=np.concatenate([rows["proprio"], finals["proprio"]]),
            actions=rows["action"].copy(),
            extras=rows["extras"].copy(),
            rewards=rows["reward"].copy(),
            terminated=rows["terminated"] != 0,
            ends=ends,
            look=_Look(self._table, observations),
            earlier=len(earlier),
        )

    def _whole(self, numbers: list[int]) -> npt.NDArray[np.int64]:
        """Those of these rows that make up whole episodes, sorted by robot, episode and step."""
        waiting = np.array(numbers, np.int64)
        rows = self._rows[waiting]
        order = np.lexsort((rows["index"], rows["episode"], rows["stream"]))
        rows = rows[order]
        whole = np.zeros(len(rows), bool)
        edges = [*_starts(rows), len(rows)]
        for start, stop in pairwise(edges):
            part = rows[start:stop]
            whole[start:stop] = part["last"][-1] and part["index"][0] == 0 and part["index"][-1] == stop - start - 1
        return waiting[order[whole]]

    def _newest_of_earlier(self) -> npt.NDArray[np.int64]:
        """Rows of the newest whole episodes by earlier policies, no more than wanted, sorted like `_whole`."""
        whole = self._whole(self._earlier)
        came = {row: place for place, row in enumerate(self._earlier)}
        episodes = np.split(whole, np.flatnonzero(self._rows["last"][whole]) + 1)[:-1]
        chosen: list[int] = []
        for episode in sorted(episodes, key=lambda episode: came[int(episode[-1])], reverse=True):
            if len(chosen) + len(episode) > self._earlier_steps:
                break
            chosen += episode.tolist()
        return whole[np.isin(whole, chosen)]

    def _outside(self, chunk: int, numbers: list[int]) -> list[int]:
        return [row for row in numbers if row // self._layout.rows != chunk]

    def _pass_on(self, numbers: npt.NDArray[np.int64]) -> None:
        """They are an earlier policy's from now on; random actions are none's."""
        if self._earlier_steps:
            self._earlier += numbers[self._rows["epoch"][numbers] != 0].tolist()

    def _part_from_others(self, version: Version) -> None:
        """Keep as the newest policy's only what this one did."""
        epoch, updates = version
        waiting = np.array(self._waiting, np.int64)
        rows = self._rows[waiting]
        ours = (rows["epoch"] == epoch) & (rows["updates"] == updates)
        if self._since is not None:
            ours |= (rows["epoch"] >= self._since) & (rows["epoch"] < epoch) & (rows["updates"] == updates)
        if not ours.all():
            self._pass_on(waiting[~ours])
            self._waiting = waiting[ours].tolist()


def _starts(rows: npt.NDArray[Any]) -> list[int]:
    """Where another episode begins."""
    if not len(rows):
        return []
    other = (np.diff(rows["stream"].astype(np.int64)) != 0) | (np.diff(rows["episode"].astype(np.int64)) != 0)
    return [0, *(np.flatnonzero(other) + 1).tolist()]


class _Look:
    """Images of a rollout's observations, read from the shared frames."""

    def __init__(self, table: ReplayTable, observations: npt.NDArray[np.int64]) -> None:
        layout = table.layout
        self._frames = table.frames
        slots = table.rows.reshape(-1)["slots"][observations]
        self._stacks = (observations // layout.rows * layout.slots)[:, None] + slots
        self._shape = (layout.frames, *layout.image_hw, 3)
        self._memory = np.zeros((0, *self._shape), np.uint8)

    def __call__(
        self, observations: npt.NDArray[np.int64], corners: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.uint8]:
        count = len(observations)
        if len(self._memory) < count:
            self._memory = np.zeros((count, *self._shape), np.uint8)
        images = self._memory[:count]
        copy_stacks(self._frames, self._stacks[observations], corners, images.view(PIXEL)[..., 0])
        return images
