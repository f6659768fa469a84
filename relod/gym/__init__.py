"""relod's tasks as Gymnasium environments. Needs `pip install relod[gym]`; importing this registers them.

import gymnasium, relod.gym

env = gymnasium.make("relod/CreateReacher-v0")
"""

from __future__ import annotations

from typing import Any

import gymnasium

from ..errors import SettingsError

__all__ = ["ENVIRONMENTS", "make"]

ENVIRONMENTS = {"CreateReacher-v0": "create", "UR5VisualReacher-v0": "ur5", "UR5MinTime-v0": "ur5-min-time"}


def make(task: str, clock: str = "virtual", **options: Any) -> Any:
    """An environment of a relod task: on the virtual clock in this process, or on the wall clock, in real time.

    `options` are those of `virtual.VirtualEnv` and `realtime.RealTimeEnv`. `SettingsError`: another clock.
    """
    if clock == "virtual":
        from .virtual import VirtualEnv

        return VirtualEnv(task, **options)
    if clock == "wall":
        from .realtime import RealTimeEnv

        return RealTimeEnv(task, **options)
    raise SettingsError(f"unknown clock {clock!r}", "known: virtual, wall")


for _name, _task in ENVIRONMENTS.items():
    gymnasium.register(id=f"relod/{_name}", entry_point="relod.gym:make", kwargs={"task": _task})
