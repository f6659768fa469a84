"""Times of each way over an emulated link, measured by the link, beside what the relay did and what really happened.

Both ends are real and share a process, so that the truth is known; the learner's clock is set wrong, and drifts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from relod.config import LinkSettings
from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from relod.runtime.log.format import EncodedFrame
from relod.runtime.remote import serversession, wire
from relod.runtime.remote.emulation import Relay
from relod.runtime.remote.link import JoinFacts, RobotLink
from relod.runtime.remote.linkprofile import PROFILES
from relod.runtime.remote.outbox import Outbox
from relod.runtime.spans import SpanRing, Stage
from relod.runtime.timing import Spans
from tests.runtime.remote.test_link import Events
from tests.runtime.remote.wirerobots import HOST, RUN, SPEC, learner

BUSY = replace(PROFILES["wifi-busy"], stall=None)  # of its stalls there is one in 15 s, and the test is shorter
DRIFT_PPM = 50
QUESTIONS = 25
PINGS_FIRST = 10
SLACK_NS = 50_000  # what 50 ppm do in the second since the last ping


class WrongClock:
    """The learner's: set wrong by `offset_ns`, and fast by 50 ppm. Remembers when each of its stamps really was."""

    def __init__(self, offset_ns: int) -> None:
        self._offset_ns, self._start_ns = offset_ns, monotonic_ns()
        self.really_ns: dict[int, int] = {}

    def now_ns(self) -> int:
        now_ns = monotonic_ns()
        stamp = now_ns + self._offset_ns + (now_ns - self._start_ns) * DRIFT_PPM // 1_000_000
        self.really_ns[stamp] = now_ns
        return stamp


@dataclass
class Listener(Events):
    """Takes answers, and notes how sure the link is of the clock just then."""

    link: RobotLink | None = None
    came: asyncio.Event = field(default_factory=asyncio.Event)
    uncertain_ns: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def answer(self, head: wire.Answer, values: bytes) -> None:
        super().answer(head, values)
        assert self.link is not None
        self.uncertain_ns[head.ask] = self.link.figures()["clock_uncertainty_ms"] * NS_PER_MS
        self.came.set()


@dataclass
class Found:
    spans: Spans
    events: Listener
    figures: dict[str, Any]
    injected: dict[str, list[tuple[int, int, int]]]


async def ask_and_answer(folder: Path) -> Found:
    ring, events, relay = SpanRing(("learner",)), Listener(), Relay()
    outbox = Outbox(folder / "outbox", memory_bytes=1 << 20, spool_bytes=1 << 20)
    async with learner() as at, asyncio.timeout(40):
        host, port = await relay.start(HOST, at.port, BUSY, seed=1)
        events.link = link = RobotLink(
            f"ws://{host}:{port}",
            token=None,
            ca=None,
            join=JoinFacts(robot="one", run=RUN, acts="learner", task=SPEC, codec="raw", algorithm="sac", presets={}),
            settings=LinkSettings(ping_every_s=0.02, silence_s=5.0),
            outbox=outbox,
            events=events,
            spans=ring.writer("learner"),
        )
        await link.open()
        while len(relay.injected["down"]) < PINGS_FIRST:  # noqa: ASYNC110  # nobody could set an event
            await asyncio.sleep(0.01)
        for number in range(QUESTIONS):
            for frame_id in (number + 1, number + 2):
                outbox.add_frame(frame_id, EncodedFrame(data=bytes(18), captured_ns=frame_id))
            events.came.clear()
            ask = monotonic_ns()
            link.ask(
                wire.Observe(ask=ask, episode=0, index=number, frame_ids=(number + 1, number + 2), now_ns=ask), bytes(8)
            )
            await events.came.wait()
        figures = link.figures()
        await link.close(drain=False)
        await relay.close()
    outbox.close()
    return Found(spans=Spans(ring.drain("learner")), events=events, figures=figures, injected=relay.injected)


@pytest.mark.parametrize("offset_s", [0, 3, -3])
def test_the_link_measures_what_the_relay_did(tmp_path, monkeypatch, offset_s):
    clock = WrongClock(offset_s * NS_PER_S)
    monkeypatch.setattr(serversession, "monotonic_ns", clock.now_ns)
    monkeypatch.setattr(serversession, "WallClock", lambda: clock)
    found = uvloop.run(ask_and_answer(tmp_path))

    sent, back = found.spans.by_index(Stage.UPLINK), found.spans.by_index(Stage.DOWNLINK)
    answers = [head for head, _ in found.events.answers]
    assert len(sent) == len(back) == len(answers) == QUESTIONS
    beyond_ns: dict[str, list[int]] = {"up": [], "down": []}
    for head in answers:
        assert head.stamps is not None
        uncertain_ns = found.events.uncertain_ns[head.ask] + SLACK_NS
        (sent_ns, there_ns), (left_ns, came_ns) = sent[head.ask], back[head.ask]
        really_there_ns, really_left_ns = (
            clock.really_ns[at] for at in (head.stamps.received_ns, head.stamps.acted_ns)
        )
        # Right within what it says of itself, however long the way was.
        assert abs(there_ns - really_there_ns) <= uncertain_ns
        assert abs(left_ns - really_left_ns) <= uncertain_ns
        # The relay's part of it: of the piece that left first, or came last. The rest is sockets and this loop.
        up = next(piece for piece in found.injected["up"] if piece[0] >= sent_ns)
        down = next(piece for piece in reversed(found.injected["down"]) if piece[2] <= came_ns)
        for way, (received_ns, _, passed_ns), measured_ns in (
            ("up", up, there_ns - sent_ns),
            ("down", down, came_ns - left_ns),
        ):
            beyond_ns[way].append(measured_ns - (passed_ns - received_ns))
            assert beyond_ns[way][-1] >= -uncertain_ns
    for way, beyond in beyond_ns.items():
        assert min(beyond) <= 3 * NS_PER_MS + max(found.events.uncertain_ns.values()), way

    figures = found.figures
    assert figures["clock_offset_ms"] == pytest.approx(1000 * offset_s, abs=figures["clock_uncertainty_ms"] + 2.0)
    assert figures["clock_uncertainty_ms"] < 30  # half of the quickest way there and back
    for way in ("up", "down"):
        assert figures[f"{way}_ms"] >= BUSY.delay_ms - figures["clock_uncertainty_ms"] - 0.1
    took_ms = np.array([(passed - received) / NS_PER_MS for received, _, passed in found.injected["up"]])
    assert took_ms.min() >= BUSY.delay_ms
