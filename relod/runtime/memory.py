"""What room a run needs, and what there is: refused at the start rather than killed hours later.

Replay and frames lie on memfds, so /dev/shm and its limit do not matter. Their pages are taken as they are filled:
without this check a replay that does not fit would end the run when the learner has just become good.
"""

from __future__ import annotations

import math

from ..config import LogSettings, ReplaySettings
from ..errors import SettingsError
from .headroom import available_bytes
from .replaytable import CHUNK_STEPS

__all__ = ["check_log", "check_replay"]

AUTO_SHARE = 0.6  # of what is available; networks, torch in two processes and the page cache of the log want the rest
SPARE_CHUNKS = 3  # of a replay: one being filled, one retired ahead, one begun by the last steps
LEAST_STEPS = 512  # least `replay.capacity`
# Of the raw pixels, at quality 90 and 160x120: the least measured, so that only what is too much for sure is refused.
JPEG_SHARE = 1 / 14
LAPTOP_STEPS = 16_000  # capacity of the profile `laptop`
MIB, GIB = 1 << 20, 1 << 30


def check_replay(layout_bytes: int, capacity: int, settings: ReplaySettings, *, available: int | None = None) -> None:
    """Refuse a replay that does not fit into the memory it may take.

    Args:
        layout_bytes: size of the replay's table for `capacity` steps.
        available: bytes of memory to be had; by default what the machine says now.

    Raises:
        SettingsError: it does not fit; the hint has a capacity that does.
    """
    available = available_bytes() if available is None else available
    limit_bytes = settings.memory_mib * MIB
    if not limit_bytes:
        allowed = int(AUTO_SHARE * available)
        reason = f"the machine has {_gib(available)} available, and it may take {AUTO_SHARE:.0%} of that"
    elif limit_bytes < available:
        allowed, reason = limit_bytes, f"replay.memory_mib allows {_gib(limit_bytes)}"
    else:
        allowed, reason = available, f"the machine has {_gib(available)} available"
    if layout_bytes > allowed:
        needed = f"{_gib(layout_bytes)} for {capacity:,} steps of {layout_bytes / capacity / 1000:,.1f} kB"
        raise SettingsError(f"the replay needs {needed}; {reason}", _hint(capacity * allowed / layout_bytes))


def check_log(step_bytes: float, capacity: int, settings: LogSettings) -> None:
    """Refuse a limit of the log that is too small for the steps of the replay, which is filled from it again.

    Args:
        step_bytes: of a step with its new frames, raw.

    Raises:
        SettingsError: the log would have to outgrow its limit, or a resumed run to go on with less experience.
    """
    stored_bytes = step_bytes * (JPEG_SHARE if settings.codec == "jpeg" else 1)
    # What goes is whole segments: one is being written, and the oldest may be needed in part only, as a chunk may.
    needed = (capacity + SPARE_CHUNKS * CHUNK_STEPS) * stored_bytes + 2 * settings.segment_mib * MIB
    if needed > settings.limit_gib * GIB:
        raise SettingsError(
            f"log.limit_gib allows {settings.limit_gib:g} GiB, and the replay's {capacity:,} steps need {_gib(needed)}",
            f"use --set log.limit_gib={math.ceil(10 * needed / GIB) / 10:g}, or a smaller replay.capacity",
        )


def _hint(steps: float) -> str:
    """What to do where a table in proportion would hold `steps`; its chunks beyond the capacity do not shrink."""
    fitting = int(steps) - SPARE_CHUNKS * CHUNK_STEPS
    fitting = fitting // 1000 * 1000 if fitting >= 2000 else fitting
    if fitting < LEAST_STEPS:
        return "free some memory, or make the task's images smaller"
    hint = f"use --set replay.capacity={fitting}"
    return f"{hint} or --profile laptop" if fitting >= LAPTOP_STEPS else hint


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.2f} GiB"
