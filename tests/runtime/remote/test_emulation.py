"""Emulated links: the pure channel against its profile, and the relay with real sockets on both loops."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from relod.errors import SettingsError
from relod.runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from relod.runtime.remote.emulation import Relay
from relod.runtime.remote.linkprofile import PROFILES, Channel, LinkProfile, Outage, profile_named

NONE = PROFILES["none"]

# -- the channel -------------------------------------------------------------------------------------------------------


def round_trips_ms(profile: LinkProfile, seed: int, duration_s: int) -> np.ndarray:
    """Of 32 bytes, asked every 20 ms and answered at once."""
    up, down = Channel(profile, up=True, seed=seed), Channel(profile, up=False, seed=seed)
    sent_ns = range(0, duration_s * NS_PER_S, 20 * NS_PER_MS)
    arrived_ns = [up.arrival_ns(at_ns, 32) for at_ns in sent_ns]
    return np.array([down.arrival_ns(b, 32) - a for a, b in zip(sent_ns, arrived_ns, strict=True)]) / NS_PER_MS


@given(
    name=st.sampled_from(sorted(PROFILES)),
    seed=st.integers(0, 1000),
    sends=st.lists(st.tuples(st.integers(0, 3 * NS_PER_S), st.integers(1, 200_000)), max_size=40),
)
def test_all_arrives_in_order_no_sooner_than_delay_and_rate_allow(name, seed, sends):
    profile, now_ns, last_ns, sent_bytes = PROFILES[name], 0, 0, 0
    channel = Channel(profile, up=True, seed=seed)
    for gap_ns, size_bytes in sends:
        now_ns += gap_ns
        sent_bytes += size_bytes
        arrives_ns = channel.arrival_ns(now_ns, size_bytes)
        assert arrives_ns >= max(last_ns, now_ns + int(profile.delay_ms * NS_PER_MS))
        if profile.up_mbit_s:
            least_ns = size_bytes * 8e3 / profile.up_mbit_s + profile.delay_ms * NS_PER_MS
            assert arrives_ns - now_ns >= least_ns - 2
        last_ns = arrives_ns


def test_a_saturated_channel_carries_its_rate():
    channel = Channel(LinkProfile(name="slow", up_mbit_s=8, delay_ms=5), up=True, seed=0)  # 1 byte a us
    arrivals_ns = [channel.arrival_ns(0, 1000) for _ in range(100)]
    assert arrivals_ns[0] == 6 * NS_PER_MS
    assert np.all(np.diff(arrivals_ns) == NS_PER_MS)


def test_up_and_down_have_their_own_rates():
    profile = LinkProfile(name="lopsided", up_mbit_s=8, down_mbit_s=80)
    assert [Channel(profile, up=up, seed=0).arrival_ns(0, 1000) for up in (True, False)] == [1_000_000, 100_000]


def test_the_same_seed_is_the_same_weather_whatever_is_sent():
    profile = PROFILES["wifi-busy"]
    busy, idle = (Channel(profile, up=True, seed=7) for _ in range(2))
    often = {at_ns: busy.arrival_ns(at_ns, 10) for at_ns in range(0, 20 * NS_PER_S, 10 * NS_PER_MS)}
    rarely = {at_ns: idle.arrival_ns(at_ns, 10) for at_ns in range(0, 20 * NS_PER_S, NS_PER_S)}
    assert all(abs(rarely[at_ns] - often[at_ns]) < 20 * NS_PER_MS for at_ns in rarely)
    assert max(rarely[at_ns] - at_ns for at_ns in rarely) > 20 * NS_PER_MS
    assert round_trips_ms(profile, 1, 20).tolist() == round_trips_ms(profile, 1, 20).tolist()
    assert round_trips_ms(profile, 1, 20).tolist() != round_trips_ms(profile, 2, 20).tolist()


def test_nothing_passes_in_an_outage_and_all_of_it_passes_afterwards():
    profile = LinkProfile(name="holes", stall=Outage(every_s=1, length_ms=(500, 500)))
    channel = Channel(profile, up=True, seed=3)
    waits_ns = np.array([channel.arrival_ns(at_ns, 1) - at_ns for at_ns in range(0, 100 * NS_PER_S, 5 * NS_PER_MS)])
    assert 480 * NS_PER_MS < waits_ns.max() <= 500 * NS_PER_MS
    assert 0.2 < np.mean(waits_ns > 0) < 0.5  # 0.5 s out of 1.5 s on average


@pytest.mark.parametrize(
    ("name", "p50", "p90", "p99"),
    [("ethernet", 0.3, 0.3, 0.4), ("wifi-good", 3, 4, 5), ("wifi-busy", 3, 20, 250), ("wifi-bad", 20, 100, 3000)],
)
def test_round_trips_are_those_that_docs_links_states(name, p50, p90, p99):
    assert np.percentile(round_trips_ms(PROFILES[name], 0, 1000), (50, 90, 99)) == pytest.approx(
        (p50, p90, p99), rel=0.25
    )


def test_an_unknown_profile_is_named_with_those_that_exist():
    with pytest.raises(SettingsError, match=r"no link profile 'wifi'; one of none, ethernet, wifi-good"):
        profile_named("wifi")


# -- the relay ---------------------------------------------------------------------------------------------------------

Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Rig(NamedTuple):
    """A relay with one connection through it."""

    relay: Relay
    robot: Peer
    learner: Peer
    accepted: asyncio.Queue[Peer]  # what the learner has got beside it

    def close(self) -> None:
        for _, writer in (self.robot, self.learner):
            writer.close()


@contextlib.asynccontextmanager
async def relayed(profile: LinkProfile) -> AsyncIterator[Rig]:
    accepted: asyncio.Queue[Peer] = asyncio.Queue()
    server = await asyncio.start_server(lambda *peer: accepted.put_nowait(peer), "127.0.0.1", 0)
    relay = Relay()
    robot = await asyncio.open_connection(*await relay.start(*server.sockets[0].getsockname(), profile, seed=1))
    rig = Rig(relay, robot, await accepted.get(), accepted)
    try:
        yield rig
    finally:
        rig.close()
        await relay.close()
        server.close()
        await server.wait_closed()


def run(profile: LinkProfile, body: Callable[[Rig], Awaitable[None]], runner: Callable[..., None] = uvloop.run) -> None:
    async def main() -> None:
        async with relayed(profile) as rig:
            await body(rig)

    runner(main())


BOTH_LOOPS = pytest.mark.parametrize("runner", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])


@BOTH_LOOPS
@pytest.mark.parametrize("name", ["none", "ethernet", "wifi-good"])
def test_bytes_pass_unchanged_in_both_directions_and_so_does_the_end_of_a_stream(name, runner):
    sent = np.random.default_rng(0).bytes(300_000)

    async def body(rig: Rig) -> None:
        relay, robot, learner, _ = rig
        robot[1].write(sent)
        robot[1].write_eof()
        assert await learner[0].read(-1) == sent
        learner[1].write(sent[::-1])  # the other half is still open
        learner[1].write_eof()
        assert await robot[0].read(-1) == sent[::-1]
        figures = relay.figures()
        assert (figures["up"]["bytes"], figures["down"]["bytes"]) == (len(sent), len(sent))

    run(PROFILES[name], body, runner)


def test_each_piece_is_late_by_the_delay_and_never_early():
    async def body(rig: Rig) -> None:
        relay, robot, learner, _ = rig
        await asyncio.sleep(0.05)
        for _ in range(20):
            robot[1].write(b"x")
            sent_ns = monotonic_ns()
            await learner[0].readexactly(1)
            assert monotonic_ns() - sent_ns >= 9 * NS_PER_MS
        stamps = relay.injected["up"]
        assert len(stamps) == 20
        assert all(due - received == 10 * NS_PER_MS and passed >= due for received, due, passed in stamps)
        assert relay.figures()["up"]["one_way_ms"]["p50"] >= 10

    run(LinkProfile(name="late", delay_ms=10), body)


def test_a_slow_link_holds_its_sender_back():
    size_bytes = 4 << 20

    async def body(rig: Rig) -> None:
        relay, robot, _, _ = rig
        robot[1].write(bytes(size_bytes))
        await asyncio.sleep(0.3)  # of some 4 s
        assert robot[1].transport.get_write_buffer_size() > 0
        assert relay._up.bytes < 1 << 20
        stamps = relay.injected["up"]
        span_s = (stamps[-1][2] - stamps[0][2]) / NS_PER_S
        assert relay._up.bytes / span_s < 2 * 1e6

    run(LinkProfile(name="slow", up_mbit_s=8, buffer_kib=64), body)


@BOTH_LOOPS
def test_in_a_stall_nothing_passes_not_even_an_end_and_afterwards_everything(runner):
    async def body(rig: Rig) -> None:
        relay, robot, learner, _ = rig
        relay.stall(0.15)
        robot[1].write(b"late")
        robot[1].write_eof()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(learner[0].read(1), 0.1)
        assert await learner[0].read(-1) == b"late"

    run(NONE, body, runner)


@BOTH_LOOPS
@pytest.mark.parametrize("profile", [NONE, LinkProfile(name="late", delay_ms=50)], ids=["none", "late"])
def test_a_cut_resets_both_ends_and_the_next_connection_works(profile, runner):
    async def body(rig: Rig) -> None:
        relay, robot, learner, _ = rig
        robot[1].write(b"never to arrive" if profile.delay_ms else b"")
        await asyncio.sleep(0.01)
        relay.cut()
        for reader, _ in (robot, learner):
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        again = await asyncio.open_connection(*robot[1].get_extra_info("peername"))
        again[1].write(b"again")
        there = await rig.accepted.get()
        assert await there[0].readexactly(5) == b"again"
        assert (relay.figures()["connections"], relay.figures()["cuts"]) == (1, 1)
        Rig(relay, again, there, rig.accepted).close()

    run(profile, body, runner)


@BOTH_LOOPS
def test_a_reset_by_one_end_reaches_the_other(runner):
    async def body(rig: Rig) -> None:
        _, robot, learner, _ = rig
        robot[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        robot[1].transport.abort()
        with pytest.raises(ConnectionResetError):
            await learner[0].read(1)

    run(NONE, body, runner)


@BOTH_LOOPS
def test_without_a_learner_the_connection_is_reset(runner):
    async def main() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            target = free.getsockname()
        relay = Relay()
        reader, writer = await asyncio.open_connection(*await relay.start(*target, NONE))
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        await relay.close()

    runner(main())


def test_a_profile_cuts_by_itself():
    async def body(rig: Rig) -> None:
        relay, robot, _, _ = rig
        with pytest.raises(ConnectionResetError):
            await robot[0].read(1)
        assert relay.cuts >= 1

    run(replace(NONE, cut_every_s=0.05), body)
