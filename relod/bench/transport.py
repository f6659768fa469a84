"""`relod bench transport`: an observation to another process and an action back, without inference.

Over relod's link, and beside it in the same run over simpler and older ways: bare websockets with the same messages,
or all of an observation in one; TCP with length prefixes, on uvloop and blocking; pickle over TCP, with whole stacks of
frames, as ReLoD sends them; ZeroMQ where pyzmq is installed.

Create's observations over loopback: one or two new camera frames of 57,600 bytes (1.35 on average) and the
proprioception up, an action of 24 bytes down. Each way has a server process of its own; all of them take turns in
blocks, so that what else the machine does meets all. Bytes of experience on the wire are computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import uvloop

from ..errors import StartError
from ..runtime.clock import NS_PER_MS, monotonic_ns
from ..runtime.messages import encode
from ..runtime.remote.wire import FrameHead, RecordHead, pack
from ..types import Step
from .echoes import ECHOES, FRAME, STACK, Client, Exchange, Server
from .form import Findings, Series, positive, ratio
from .linkecho import create_spec, open_relod, serve_relod

__all__ = ["ROUNDS", "SHORT_ROUNDS", "TransportRequest", "measure_transport"]

ROUNDS, SHORT_ROUNDS = 100, 10
BASELINE = "websockets"
FRAMES_PER_CYCLE = 1.35  # 30 frames a second in cycles of 45 ms
START_LIMIT_S = 60.0  # of a server: imports on a busy small machine

WAYS: dict[str, tuple[Server, Client]] = {
    "relod": (serve_relod, open_relod),
    **ECHOES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportRequest:
    """What to measure: `rounds` blocks of so many exchanges of each way."""

    rounds: int = ROUNDS
    exchanges: int = 200
    pause_ms: float = 0.0  # between two exchanges

    def __post_init__(self) -> None:
        positive("--rounds", self.rounds)
        positive("--exchanges", self.exchanges)
        if self.pause_ms:
            positive("--pause-ms", self.pause_ms)


def measure_transport(request: TransportRequest) -> Findings:
    """Round trips of every way, and what experience takes on the wire."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="relod-bench-"))
        starting = {name: stack.enter_context(_serving(name)) for name in WAYS}
        ports = {name: port() for name, port in starting.items()}
        samples = uvloop.run(_measure(request, ports, Path(folder)))
    medians = {name: [float(np.median(block)) for block in blocks] for name, blocks in samples.items()}
    told = experience_bytes()
    notes = [
        f"experience of a Create takes {told['relod_bytes_per_s'] / 1e6:.2f} MB/s over relod's link",
        f"whole stacks of frames would take {told['whole_stacks_bytes_per_s'] / 1e6:.2f} MB/s",
    ]
    if "zeromq" not in samples:
        notes.append("pyzmq is not installed, so ZeroMQ was left out")
    return Findings(
        benchmark="transport",
        parameters={"rounds": request.rounds, "exchanges": request.exchanges, "pause_ms": request.pause_ms},
        samples={name: Series(values=[each for one in blocks for each in one]) for name, blocks in samples.items()},
        ratios={name: ratio(BASELINE, each, medians[BASELINE]) for name, each in medians.items() if name != BASELINE},
        facts={"experience": told},
        notes=notes,
    )


async def _measure(request: TransportRequest, ports: Mapping[str, int], folder: Path) -> dict[str, list[list[float]]]:
    """Milliseconds of each exchange of each block, by way; the ways take turns, one more block warms up."""
    samples: dict[str, list[list[float]]] = {name: [] for name in ports}
    async with contextlib.AsyncExitStack() as stack:
        exchanges = {
            name: await stack.enter_async_context(WAYS[name][1](port, folder / name)) for name, port in ports.items()
        }
        for _ in range(request.rounds + 1):
            for name, exchange in exchanges.items():
                samples[name].append(await _block(exchange, request.exchanges, request.pause_ms / 1e3))
    return {name: blocks[1:] for name, blocks in samples.items()}


async def _block(exchange: Exchange, count: int, pause_s: float) -> list[float]:
    found = []
    for _, frames in zip(range(count), new_frames(), strict=False):
        start_ns = monotonic_ns()
        await exchange(frames)
        found.append((monotonic_ns() - start_ns) / NS_PER_MS)
        if pause_s:
            await asyncio.sleep(pause_s)
    await asyncio.sleep(0.002)  # whoever waits for this loop has its turn
    return found


def new_frames() -> Iterator[int]:
    """Frames that are new in each cycle, 1 or 2."""
    cycle = 0
    while True:
        cycle += 1
        yield int(cycle * FRAMES_PER_CYCLE) - int((cycle - 1) * FRAMES_PER_CYCLE)


# -- servers -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _serving(name: str) -> Iterator[Callable[[], int]]:
    """The server of a way in a process of its own; gives what waits for its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(name, theirs), name=f"echo {name}", daemon=True)
    server.start()
    theirs.close()

    def port() -> int:
        try:
            if ours.poll(START_LIMIT_S):
                return int(ours.recv())
        except EOFError:
            pass
        raise StartError(f"the server of {name} did not start", "see what it says above")

    try:
        yield port
    finally:
        server.kill()
        server.join()
        ours.close()


def _serve(name: str, parent: Connection) -> None:
    """Body of a server's process, which ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with contextlib.suppress(ConnectionResetError):  # the blocking ones' way to see that it is over
        uvloop.run(_served(name, parent))


async def _served(name: str, parent: Connection) -> None:
    def tell(port: int) -> None:
        parent.send(port)
        threading.Thread(target=_outlive, args=(parent,), daemon=True).start()

    await WAYS[name][0](tell)


def _outlive(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv()  # nothing ever comes
    os._exit(0)


# -- bytes -------------------------------------------------------------------------------------------------------------


def experience_bytes() -> dict[str, float]:
    """Bytes a second that a Create's experience takes, raw: each frame once and a record a cycle, or whole stacks."""
    spec = create_spec()
    cycles_per_s, frames_per_s = 1e9 / spec.cycle_ns, spec.camera_fps
    step = Step(
        episode=1000,
        index=500,
        frame_ids=(100_000, 100_001, 100_002),
        proprio=np.zeros(spec.proprio_dim, np.float32),
        action=np.zeros(spec.action_dim, np.float32),
        reward=-1.0,
        terminated=False,
        truncated=False,
        extras=np.zeros(0, np.float32),
        policy_version=(1, 100_000),
        observed_ns=2**50,
        acted_ns=2**50,
    )
    websocket_header = 14  # of a masked message over 65,535 bytes; shorter ones have less
    frame = websocket_header + len(pack(FrameHead(id=100_000, captured_ns=2**50), FRAME))
    record = websocket_header + len(pack(RecordHead(seq=100_000), encode(step)))
    observation = np.zeros((3 * STACK, *spec.image_hw), np.uint8), np.zeros(spec.proprio_dim, np.float32)
    stacked = len(pickle.dumps(observation)) + len(pickle.dumps((step.action, -1.0, False)))
    return {
        "relod_bytes_per_s": round(frames_per_s * frame + cycles_per_s * record),
        "whole_stacks_bytes_per_s": round(cycles_per_s * stacked),
        "frame_bytes": frame,
        "record_bytes": record,
    }
