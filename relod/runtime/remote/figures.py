"""What a link did: round trips, answers, bytes and clocks; pure."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import msgspec

from ..clock import NS_PER_MS, NS_PER_S
from ..spans import Histogram, SpanWriter, Stage
from .clockoffset import ClockOffset
from .wire import Answer, Stamps

__all__ = ["LinkFigures"]

RATE_WINDOW_NS = 3 * NS_PER_S
RECORDS_KEPT = 4096  # records whose ack is still expected; the times of older ones are not told
WAY_LIMIT_NS = 100 * NS_PER_S
ASKS_KEPT = 64  # questions whose answer is still expected; at 30 Hz those of the last 2 s


class LinkFigures:
    """Counts and times of one robot's link; bytes are those of messages, without websocket, TLS and TCP around them."""

    def __init__(self, spans: SpanWriter | None = None) -> None:
        self._spans = spans
        self.reconnects = 0  # times that the link was lost
        self.uplink_bytes = 0
        self.downlink_bytes = 0
        self.late_answers = 0  # that came after a newer question was asked
        self._clock = ClockOffset()
        self._round_trips = Histogram()
        self._answers = Histogram()
        self._answered_ms: list[float] = []  # to go into it, which takes longer than handing on an answer
        self._asked: dict[int, int] = {}  # when, by question
        self._sent: dict[int, int] = {}  # when it was given to the socket, by question
        self._records: deque[tuple[int, int]] = deque(maxlen=RECORDS_KEPT)  # (number, when it was given to the link)
        self._bytes: deque[tuple[int, int, int]] = deque()  # (when, up, down)

    def tick(self, now_ns: int) -> None:
        """Note the bytes so far, for their rates; a few times a second."""
        self._bytes.append((now_ns, self.uplink_bytes, self.downlink_bytes))
        while self._bytes[0][0] < now_ns - RATE_WINDOW_NS:
            self._bytes.popleft()
        self._flush()

    def _flush(self) -> None:
        self._answers.add_ms(self._answered_ms)
        self._answered_ms.clear()

    def asked(self, ask: int, now_ns: int) -> None:
        """A question was handed over."""
        self._asked[ask] = now_ns
        if len(self._asked) > ASKS_KEPT:
            oldest = next(iter(self._asked))
            del self._asked[oldest]
            self._sent.pop(oldest, None)

    def sent(self, ask: int, now_ns: int) -> None:
        """The question is given to the socket."""
        if self._spans is not None and ask in self._asked:
            self._sent[ask] = now_ns
            self._spans.add(Stage.SEND, ask, ask, now_ns)

    def answered(self, answer: Answer, now_ns: int) -> None:
        """The answer is here."""
        ask = answer.ask
        if (asked_ns := self._asked.pop(ask, None)) is not None:
            self._answered_ms.append((now_ns - asked_ns) / NS_PER_MS)
            self.late_answers += any(newer > ask for newer in self._asked)
        sent_ns = self._sent.pop(ask, None)
        if self._spans is not None and sent_ns is not None and answer.stamps is not None:
            self._stamp_way(self._spans, ask, sent_ns, answer.stamps, now_ns)

    def _stamp_way(self, spans: SpanWriter, ask: int, sent_ns: int, stamps: Stamps, now_ns: int) -> None:
        """The question's way through the learner, on this host's clock as far as its offset is known."""
        offset_ns = self._clock.offset_ns
        if offset_ns is None:
            return
        moments = (sent_ns, *(t - offset_ns for t in msgspec.structs.astuple(stamps)), now_ns)
        if max(moments) - min(moments) > WAY_LIMIT_NS:
            return  # no way of an answer that is still expected takes so long: the other clock was set
        stages = Stage.UPLINK, Stage.DECODE, Stage.QUEUE, Stage.INFERENCE, Stage.DOWNLINK
        for stage, (start_ns, end_ns) in zip(stages, itertools.pairwise(moments), strict=True):
            spans.add(stage, ask, start_ns, end_ns)

    def recorded(self, number: int, now_ns: int) -> None:
        """The link has records up to this one."""
        if self._spans is not None:
            self._records.append((number, now_ns))

    def acked(self, number: int, now_ns: int) -> None:
        """The learner has records up to this one."""
        while self._records and self._records[0][0] <= number:
            given, given_ns = self._records.popleft()
            if self._spans is not None:
                self._spans.add(Stage.DELIVER, given, given_ns, now_ns)

    def pong(self, sent_ns: int, received_ns: int, replied_ns: int, arrived_ns: int) -> None:
        """The four stamps of a ping and its answer; the learner's own time is not part of the round trip."""
        if self._clock.add(sent_ns, received_ns, replied_ns, arrived_ns):
            self._round_trips.add_ms(((arrived_ns - sent_ns) - (replied_ns - received_ns)) / NS_PER_MS)

    def cut(self) -> None:
        """The link was lost: no answer comes any more, and no bytes pass."""
        self._asked.clear()
        self._sent.clear()
        self._bytes.clear()

    @property
    def rtt_ms(self) -> float:
        """The median round trip so far."""
        return self._round_trips.percentile_ms(50.0)

    def to_dict(self) -> dict[str, Any]:
        """All figures; times of the clocks are None before the first answer to a ping."""
        self._flush()
        up, down = self._rates()
        clock = self._clock
        return {
            "reconnects": self.reconnects,
            "rtt_ms": self._round_trips.summary_ms(),
            "answer_ms": self._answers.summary_ms(),
            "late_answers": self.late_answers,
            "uplink_bytes": self.uplink_bytes,
            "downlink_bytes": self.downlink_bytes,
            "uplink_bytes_per_s": up,
            "downlink_bytes_per_s": down,
            "clock_offset_ms": _rounded(clock.offset_ms),
            "clock_uncertainty_ms": _rounded(clock.uncertainty_ms),
            "up_ms": _rounded(clock.up_ms),
            "down_ms": _rounded(clock.down_ms),
        }

    def _rates(self) -> tuple[int, int]:
        if len(self._bytes) < 2:
            return 0, 0
        (first_ns, first_up, first_down), (last_ns, last_up, last_down) = self._bytes[0], self._bytes[-1]
        seconds = (last_ns - first_ns) / NS_PER_S
        return round((last_up - first_up) / seconds), round((last_down - first_down) / seconds)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
