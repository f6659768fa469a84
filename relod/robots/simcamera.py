"""When a simulated camera's frames are taken and when they arrive.

A free-running camera does not know the control cycle: it has its own phase and jitter, its frames are late, some
are lost, some are held up and then arrive in a burst. The pixels are somebody else's: `SimCamera` asks a renderer
for the image of an instant, once per delivered frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from ..config import Section
from ..runtime.clock import NS_PER_MS, NS_PER_S
from ..seeds import random_stream
from ..types import Image

__all__ = ["PRESETS", "CameraTiming", "SimCamera", "SimFrame"]

Render: TypeAlias = Callable[[int], Image]

_SPACING_NS = NS_PER_MS // 10  # frames of a burst arrive this far apart, as back-to-back transfers do
_SIGMAS = 6.0  # latency noise is cut here, so that `longest_latency_ns` is a bound
_BATCH = 256  # random numbers drawn at a time; a single draw costs ten times as much


class CameraTiming(Section, frozen=True):
    """Timing of a simulated camera; the defaults are a USB webcam's."""

    fps: Annotated[float, Meta(gt=0, le=240, description="frames per second")] = 30.0
    random_phase: Annotated[bool, Meta(description="first frame anywhere in an interval, not at the start")] = True
    interval_jitter: Annotated[float, Meta(ge=0, le=0.1, description="standard deviation of an interval, relative")] = (
        0.002
    )
    latency_ms: Annotated[float, Meta(ge=0, le=1000, description="middle of the exposure to arrival, mean")] = 45.0
    latency_jitter_ms: Annotated[float, Meta(ge=0, le=200, description="its standard deviation")] = 4.0
    drop: Annotated[float, Meta(ge=0, le=0.9, description="probability that a frame is lost")] = 0.004
    hiccup: Annotated[float, Meta(ge=0, le=1, description="probability that a frame is held up")] = 0.002
    hiccup_min_ms: Annotated[float, Meta(ge=0, le=5000, description="least extra latency of a held-up frame")] = 30.0
    hiccup_max_ms: Annotated[float, Meta(ge=0, le=5000, description="most extra latency of a held-up frame")] = 90.0

    @property
    def longest_latency_ns(self) -> int:
        """No frame arrives later than this after its capture: how much history a renderer must keep."""
        longest_ms = self.latency_ms + _SIGMAS * self.latency_jitter_ms + max(self.hiccup_min_ms, self.hiccup_max_ms)
        return round(longest_ms * NS_PER_MS) + NS_PER_MS


PRESETS: Mapping[str, CameraTiming] = MappingProxyType(
    {
        "ideal": CameraTiming(interval_jitter=0.0, latency_ms=0.0, latency_jitter_ms=0.0, drop=0.0, hiccup=0.0),
        "nominal": CameraTiming(),
        # A camera behind busy Wi-Fi.
        "harsh": CameraTiming(
            interval_jitter=0.01,
            latency_ms=100.0,
            latency_jitter_ms=15.0,
            drop=0.02,
            hiccup=0.03,
            hiccup_min_ms=60.0,
            hiccup_max_ms=250.0,
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimFrame:
    """A frame as it arrives."""

    captured_ns: int  # middle of the exposure
    available_ns: int  # when the host has it
    image: Image  # (H, W, 3) uint8, BGR


class SimCamera:
    """A free-running camera on the caller's clock.

    `render(captured_ns)` gives the image of an instant; it is called once for each delivered frame, in order, when
    the frame is delivered. Which frames there are and their stamps depend on `timing`, `seed` and `start_ns` only,
    never on how often `due` is called.
    """

    def __init__(self, render: Render, timing: CameraTiming, seed: int, start_ns: int) -> None:
        self._render = render
        self._arrivals = _arrivals(timing, seed, start_ns, round(NS_PER_S / timing.fps))
        self._next = next(self._arrivals)

    @classmethod
    def one_frame_per(cls, period_ns: int, render: Render, timing: CameraTiming, seed: int, start_ns: int) -> SimCamera:
        """A camera in step with the control cycle, for studies: one frame a period, at its start, none lost.

        The mean latency stays that of `timing`.
        """
        if period_ns <= 0:
            raise ValueError(f"period must be positive, not {period_ns} ns")
        steady = msgspec.structs.replace(
            timing, random_phase=False, interval_jitter=0.0, latency_jitter_ms=0.0, drop=0.0, hiccup=0.0
        )
        camera = cls(render, steady, seed, start_ns)
        camera._arrivals = _arrivals(steady, seed, start_ns, period_ns)
        camera._next = next(camera._arrivals)
        return camera

    @property
    def next_available_ns(self) -> int:
        """When the next frame arrives."""
        return self._next[1]

    def due(self, now_ns: int) -> list[SimFrame]:
        """The frames that have arrived by `now_ns` and were not handed out before, oldest first."""
        frames = []
        while self._next[1] <= now_ns:
            captured_ns, available_ns = self._next
            image = self._render(captured_ns)
            frames.append(SimFrame(captured_ns=captured_ns, available_ns=available_ns, image=image))
            self._next = next(self._arrivals)
        return frames


def _arrivals(timing: CameraTiming, seed: int, start_ns: int, interval_ns: int) -> Iterator[tuple[int, int]]:
    """Endless (captured_ns, available_ns) of the frames that are not lost, both increasing."""
    intervals = _normals(seed, "camera.interval")
    latencies = _normals(seed, "camera.latency")
    fates = _uniforms(seed, "camera.fate")  # lost, held up or neither
    holds = _uniforms(seed, "camera.hold")
    phase = random_stream(seed, "camera.phase").random() if timing.random_phase else 0.0
    captured = start_ns + phase * interval_ns
    arrived_ns = start_ns
    while True:
        noise = max(-_SIGMAS, min(_SIGMAS, next(latencies)))
        fate, hold = next(fates), next(holds)
        if fate >= timing.drop:
            # A quarter of the mean is the least a transfer can take, whatever the noise says.
            latency_ms = max(0.25 * timing.latency_ms, timing.latency_ms + timing.latency_jitter_ms * noise)
            if fate < timing.drop + timing.hiccup:
                latency_ms += timing.hiccup_min_ms + hold * (timing.hiccup_max_ms - timing.hiccup_min_ms)
            captured_ns = round(captured)
            arrived_ns = max(captured_ns + round(latency_ms * NS_PER_MS), arrived_ns + _SPACING_NS)
            yield captured_ns, arrived_ns
        captured += interval_ns * max(0.5, 1.0 + timing.interval_jitter * next(intervals))


def _normals(seed: int, name: str) -> Iterator[float]:
    rng = random_stream(seed, name)
    while True:
        yield from rng.standard_normal(_BATCH).tolist()


def _uniforms(seed: int, name: str) -> Iterator[float]:
    rng = random_stream(seed, name)
    while True:
        yield from rng.random(_BATCH).tolist()
