"""The parts of a task `gym:NAME`, for a name that is only known when it is asked for.

A task's parts are found by "module:attribute", in other processes too. Here the attribute says which environment is
meant: `driver_50656e64756c756d2d7631` is the driver of `Pendulum-v1`, whose name is written in hexadecimal.
"""

from __future__ import annotations

import functools
from typing import Any

__all__: list[str] = []


def __getattr__(attribute: str) -> Any:
    part, _, mark = attribute.partition("_")
    if part not in ("driver", "commissioning", "emulator", "world") or not mark:
        raise AttributeError(attribute)
    return _make(part, bytes.fromhex(mark).decode())


@functools.cache
def _make(part: str, name: str) -> Any:
    from .simulation import Shape

    if part == "driver":
        from .driver import make_driver

        return make_driver(Shape(name))
    if part == "commissioning":
        from .commission import make_commissioning

        return make_commissioning(Shape(name))
    from . import world

    return functools.partial(world.VirtualGym if part == "world" else world.serve_world, name)
