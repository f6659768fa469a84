"""The learning curve of one run: its episodes.jsonl read back, and a picture of it. Curves of many: `plot.py`.

The picture needs matplotlib: relod[plots].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = [
    "CUT_REASONS",
    "MEAN_EPISODES",
    "Episode",
    "bootstrap_interval",
    "read_episodes",
    "running_mean",
    "write_curve",
]

MEAN_EPISODES = 20  # the published figures average the episodes of a few minutes
RESAMPLES = 2000  # of a bootstrap; another thousand moves its ends by less than a line is wide

# Ends that say nothing about the policy: what the cycle and the run give as reasons, not the task.
CUT_REASONS = frozenset(
    {
        "end of the run",
        "interrupted",
        "safety stop",
        "no sensor data",
        "no camera image",
        "the robot was connected again",
    }
)

# Ends of episodes that have a colour of their own; others share grey. Blue and orange also differ for colour-blind
# readers.
COLOURS = {"target reached": "#0072b2", "time limit": "#e69f00", "wheel drop": "#d55e00"}
OTHER_COLOUR = "#888888"


class Episode(msgspec.Struct, frozen=True):
    """One line of episodes.jsonl, as far as curves need it."""

    experience_s: float
    return_: float = msgspec.field(name="return")
    reason: str = ""
    wall_s: float = 0.0
    steps: int = 0  # of the run so far
    success: bool = False

    @property
    def cut(self) -> bool:
        """Whether it ended for a reason outside the task, so that its return is not a whole episode's."""
        return self.reason in CUT_REASONS


def read_episodes(path: Path) -> list[Episode]:
    """The episodes in the file; a last line cut short by a crash is left out."""
    decoder = msgspec.json.Decoder(Episode)
    episodes = []
    for line in path.read_bytes().splitlines():
        try:
            episodes.append(decoder.decode(line))
        except msgspec.DecodeError:
            break
    return episodes


def running_mean(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Mean of each value and those before it, `count` at most; same shape as `values`."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - count)
    means: npt.NDArray[np.float64] = (sums[ends] - sums[begins]) / (ends - begins)
    return means


def bootstrap_interval(
    values: npt.NDArray[np.float64], seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Ends `(G,)` of the 95 % percentile bootstrap interval of the mean over the rows of `values`, `(R, G)`.

    Rows are drawn whole, so a run's points stay together. The same values give the same interval.
    """
    count = len(values)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    low, high = np.percentile(weights @ values, (2.5, 97.5), axis=0)
    return low, high


def write_curve(folder: Path, title: str) -> str:
    """Draw learning-curve.png in the run folder; returns a line that says where it is, or why there is none."""
    episodes = read_episodes(folder / "episodes.jsonl")
    if not episodes:
        return "no learning curve: no episode was finished"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no learning curve: matplotlib is not installed (pip install relod[plots])"
    figure = Figure(figsize=(8.0, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure.add_subplot(), episodes, title)
    path = folder / "learning-curve.png"
    try:
        figure.savefig(path)
    except OSError as error:
        return f"no learning curve: {path} cannot be written: {error.strerror}"
    return f"learning curve: {path}"


def _draw(axes: Any, episodes: list[Episode], title: str) -> None:
    minutes = np.array([episode.experience_s for episode in episodes]) / 60
    returns = np.array([episode.return_ for episode in episodes])
    reasons = np.array([episode.reason or "other" for episode in episodes])
    for reason in dict.fromkeys(reasons.tolist()):
        chosen = reasons == reason
        label = f"{reason}: {chosen.sum()} of {len(episodes)}"
        colour = COLOURS.get(reason, OTHER_COLOUR)
        axes.scatter(minutes[chosen], returns[chosen], s=14, alpha=0.6, linewidths=0, color=colour, label=label)
    axes.plot(
        minutes,
        running_mean(returns, MEAN_EPISODES),
        color="#222222",
        linewidth=1.8,
        label=f"mean of {MEAN_EPISODES} episodes",
    )
    axes.set_xlabel("experience (minutes, without resets and charging)")
    axes.set_ylabel("return per episode")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
