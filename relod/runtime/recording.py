"""Recordings: every input of a run's cycles, for a replay through the same pure cycle (`playback.py`).

A recorded run folder also holds
    trace.bin      messages (`messages.py`), each after its length as uint32: a CycleRecord per cycle, then the step
                   and the end of an episode that the cycle gave
    frames.bin     camera frames at full size: id, captured_ns, arrived_ns as int64, then the pixels
    policies/      each policy that acted, as <epoch>-<updates>.npy, float32
"""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import IO

import numpy as np

from ..types import FloatArray, Frame
from .rundir import disk_errors

__all__ = ["FRAME", "LENGTH", "Recorder", "save_policy"]

LENGTH = struct.Struct("<I")
FRAME = struct.Struct("<qqq")
FRAMES_LIMIT_BYTES = 4 << 30  # 43 minutes of 160x120 at 30 Hz


class Recorder:
    """Writes the trace of a run, in the parent; ends by itself at the size limit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trace: IO[bytes] = (folder / "trace.bin").open("wb")
        self._frames: IO[bytes] = (folder / "frames.bin").open("wb")
        self.full = False

    def add_message(self, data: bytes) -> None:
        """Keep one message as it came."""
        if not self.full:
            with disk_errors(self._folder / "trace.bin"):
                self._trace.write(LENGTH.pack(len(data)) + data)

    def add_frame(self, frame: Frame) -> None:
        """Keep one camera frame."""
        if not self.full:
            with disk_errors(self._folder / "frames.bin"):
                self._frames.write(FRAME.pack(frame.id, frame.captured_ns, frame.arrived_ns))
                self._frames.write(frame.image.tobytes())
            self.full = self._frames.tell() > FRAMES_LIMIT_BYTES

    def close(self) -> None:
        """Write out what is buffered; what no longer fits is lost with its tail, which a replay leaves out."""
        for file in (self._trace, self._frames):
            with contextlib.suppress(OSError):
                file.close()


def save_policy(folder: Path, version: tuple[int, int], flat: FloatArray) -> None:
    """Keep a policy that is about to act."""
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{version[0]}-{version[1]}.npy", flat, allow_pickle=False)
