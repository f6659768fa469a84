"""Emulated links: what each does to a connection, and when what is sent over it arrives; pure.

When bytes pass depends on the profile, the seed and the time since the start alone, so that two runs with one seed
meet the same weather whatever they send. docs/links.md says what the figures rest on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import SettingsError
from ..clock import NS_PER_MS, NS_PER_S

__all__ = ["PROFILES", "Channel", "LinkProfile", "Outage", "profile_named"]

JITTER_SLOT_NS = 10 * NS_PER_MS  # the channel is the same for about this long, so neighbours share their delay
JITTER_BLOCK = 512  # slots drawn at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """Times in which nothing passes and nothing closes; what was sent meanwhile passes afterwards."""

    every_s: float  # mean time between the end of one and the next one's start, exponential
    length_ms: tuple[float, float]  # shortest and longest, all lengths between them equally likely


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """What a link does to a connection; 0 and None mean: not this."""

    name: str
    delay_ms: float = 0.0  # one way, always
    jitter_ms: float = 0.0  # one way on top of it: median of a log-normal distribution
    jitter_sigma: float = 0.0  # standard deviation of its logarithm
    up_mbit_s: float = 0.0  # robot to learner
    down_mbit_s: float = 0.0
    buffer_kib: int = 256  # waiting in one direction; beyond it the sender is held back
    burst: Outage | None = None  # short: retransmissions, a radio that listens on other channels
    stall: Outage | None = None  # long enough to count as a cut, yet nobody closes anything
    cut_every_s: float = 0.0  # mean time between two resets of the connection, exponential


# docs/links.md: published round trips beside those of the profiles, and which figures are assumed.
PROFILES = {
    profile.name: profile
    for profile in (
        LinkProfile(name="none"),
        LinkProfile(name="ethernet", delay_ms=0.1, jitter_ms=0.03, jitter_sigma=0.5, up_mbit_s=940, down_mbit_s=940),
        LinkProfile(
            name="wifi-good",
            delay_ms=0.9,
            jitter_ms=0.5,
            jitter_sigma=0.6,
            up_mbit_s=200,
            down_mbit_s=200,
            burst=Outage(every_s=120, length_ms=(80, 120)),
        ),
        LinkProfile(
            name="wifi-busy",
            delay_ms=0.9,
            jitter_ms=0.4,
            jitter_sigma=1.0,
            up_mbit_s=60,
            down_mbit_s=60,
            burst=Outage(every_s=0.2, length_ms=(5, 60)),
            stall=Outage(every_s=15, length_ms=(100, 700)),
        ),
        LinkProfile(
            name="wifi-bad",
            delay_ms=2.0,
            jitter_ms=4.5,
            jitter_sigma=0.9,
            up_mbit_s=25,
            down_mbit_s=25,
            burst=Outage(every_s=0.2, length_ms=(10, 140)),
            stall=Outage(every_s=60, length_ms=(1000, 6000)),
            cut_every_s=180,
        ),
    )
}


def profile_named(name: str) -> LinkProfile:
    """The profile of this name; `SettingsError` when there is none."""
    if name not in PROFILES:
        raise SettingsError(f"no link profile {name!r}", f"one of {', '.join(PROFILES)}")
    return PROFILES[name]


class _Outages:
    """The outages of one kind, in their order."""

    def __init__(self, outage: Outage, seed: list[int]) -> None:
        self._outage, self._rng = outage, np.random.default_rng(seed)
        self._start_ns, self._end_ns = 0, 0
        self._next()

    def _next(self) -> None:
        self._start_ns = self._end_ns + int(self._rng.exponential(self._outage.every_s) * NS_PER_S)
        self._end_ns = self._start_ns + int(self._rng.uniform(*self._outage.length_ms) * NS_PER_MS)

    def clear_ns(self, at_ns: int) -> int:
        """The first moment from `at_ns` on without one; the past cannot be asked for again."""
        while at_ns >= self._end_ns:
            self._next()
        return self._end_ns if at_ns >= self._start_ns else at_ns


class Channel:
    """One direction of a link, without I/O: when what is sent now will arrive. Times are ns since the relay's start."""

    def __init__(self, profile: LinkProfile, *, up: bool, seed: int) -> None:
        self._delay_ns = profile.delay_ms * NS_PER_MS
        self._jitter = (profile.jitter_ms * NS_PER_MS, profile.jitter_sigma)
        rate_mbit_s = profile.up_mbit_s if up else profile.down_mbit_s
        self._ns_per_byte = 8e3 / rate_mbit_s if rate_mbit_s else 0.0
        # Both directions share the radio, and so its outages.
        outages = enumerate((profile.burst, profile.stall))
        self._outages = [_Outages(outage, [seed, kind]) for kind, outage in outages if outage is not None]
        self._jitter_seed = [seed, 3 if up else 4]
        self._block = -1
        self._jitter_ns = np.zeros(JITTER_BLOCK)
        self._free_ns = 0  # the last byte's way onto the air
        self._last_ns = 0  # the last byte's arrival
        self.limited = rate_mbit_s > 0
        self.ideal = not (self._delay_ns or self._jitter[0] or self.limited or self._outages)

    def arrival_ns(self, sent_ns: int, size_bytes: int) -> int:
        """When the last of `size_bytes` given to the link at `sent_ns` arrives; after everything sent before it."""
        start_ns = max(sent_ns, self._free_ns)
        for outages in self._outages:
            start_ns = outages.clear_ns(start_ns)
        self._free_ns = start_ns + int(size_bytes * self._ns_per_byte)
        self._last_ns = max(self._last_ns, self._free_ns + int(self._delay_ns + self._jitter_at(self._free_ns)))
        return self._last_ns

    def _jitter_at(self, at_ns: int) -> float:
        median_ns, sigma = self._jitter
        if not median_ns:
            return 0.0
        block, index = divmod(at_ns // JITTER_SLOT_NS, JITTER_BLOCK)
        if block != self._block:
            draws = np.random.default_rng([*self._jitter_seed, block]).standard_normal(JITTER_BLOCK)
            self._block, self._jitter_ns = block, median_ns * np.exp(sigma * draws)
        return float(self._jitter_ns[index])
