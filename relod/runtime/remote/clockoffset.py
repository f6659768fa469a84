"""What another host's clock shows, from exchanges of stamps; pure. Diagnostic only: control never uses it.

An exchange has NTP's four stamps: the question sent and the answer arrived on this host's clock, the question received
and replied to on the other's. Neither way can take less than no time, so each exchange bounds the offset from above
by its way there and from below by its way back:

    arrived - replied   ≥  -offset        received - sent  ≥  offset

The least bounds of a window of exchanges hold all at once, each widened by what the clocks may have drifted apart
since. An exchange that was quick both ways is NTP's minimum-delay filter; two that were quick one way each do as well.
"""

from __future__ import annotations

import statistics
from collections import deque

from ..clock import NS_PER_MS, NS_PER_S

__all__ = ["ClockOffset"]

WINDOW_NS = 30 * NS_PER_S
# Crystals are within 50 ppm, so two of them drift apart by up to twice that. What NTP slews while it corrects a clock
# is more (500 ppm); then bounds contradict each other and the older ones are dropped.
DRIFT_PPM = 100
ONE_WAYS = 16  # exchanges whose one-way times are shown: 4 s of them


class ClockOffset:
    """Offset of the other host's clock: its reading minus this one's at the same moment."""

    def __init__(self, *, window_ns: int = WINDOW_NS, drift_ppm: int = DRIFT_PPM) -> None:
        self._window_ns = window_ns
        self._drift_ppm = drift_ppm
        self._bounds: deque[tuple[int, int, int]] = deque()  # (sent, offset at least, offset at most), ns
        self._ways: deque[tuple[int, int]] = deque(maxlen=ONE_WAYS)  # (received - sent, arrived - replied), ns
        self.offset_ns: int | None = None  # None before the first exchange
        self.uncertainty_ns = 0  # the true offset is within this of `offset_ns`, if the drift is as assumed

    def add(self, sent_ns: int, received_ns: int, replied_ns: int, arrived_ns: int) -> bool:
        """Take an exchange; False, and nothing done, for stamps that contradict themselves."""
        at_least, at_most = replied_ns - arrived_ns, received_ns - sent_ns
        if arrived_ns < sent_ns or replied_ns < received_ns or at_least > at_most:
            return False
        self._ways.append((received_ns - sent_ns, arrived_ns - replied_ns))
        self._bounds.append((sent_ns, at_least, at_most))
        while self._bounds[0][0] < arrived_ns - self._window_ns:
            self._bounds.popleft()
        self._estimate(arrived_ns)
        return True

    def _estimate(self, now_ns: int) -> None:
        low, high = -(2**80), 2**80
        for sent_ns, at_least, at_most in reversed(self._bounds):
            drift_ns = (now_ns - sent_ns) * self._drift_ppm // 1_000_000 + 1
            newer_low, newer_high = max(low, at_least - drift_ns), min(high, at_most + drift_ns)
            if newer_low > newer_high:  # one of the clocks was stepped or slewed: what came before says nothing
                while self._bounds[0][0] <= sent_ns:
                    self._bounds.popleft()
                break
            low, high = newer_low, newer_high
        self.offset_ns = (low + high) // 2
        self.uncertainty_ns = (high - low + 1) // 2

    @property
    def offset_ms(self) -> float | None:
        return None if self.offset_ns is None else self.offset_ns / NS_PER_MS

    @property
    def uncertainty_ms(self) -> float | None:
        return None if self.offset_ns is None else self.uncertainty_ns / NS_PER_MS

    @property
    def up_ms(self) -> float | None:
        """Median time of the last exchanges' way there; as uncertain as the offset."""
        return None if self.offset_ns is None else self._median_ms(0) - self.offset_ns / NS_PER_MS

    @property
    def down_ms(self) -> float | None:
        """Median time of the last exchanges' way back; as uncertain as the offset."""
        return None if self.offset_ns is None else self._median_ms(1) + self.offset_ns / NS_PER_MS

    def _median_ms(self, way: int) -> float:
        return statistics.median(pair[way] for pair in self._ways) / NS_PER_MS
