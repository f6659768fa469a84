"""The target on the monitor: its geometry, and what is said about it. Pure; sockets are in `targetpage.py`.

The screen is 160 units wide and 90 high, x to the right, y down, from its upper left corner. The target is a red disc
on white with a radius of 7 units.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

__all__ = [
    "DEFAULT_PORT",
    "HEIGHT",
    "NO_TARGET",
    "PAGE_PATH",
    "RADIUS",
    "ROBOT_PATH",
    "WIDTH",
    "Pages",
    "Painted",
    "Place",
    "Refused",
    "Show",
    "draw_place",
    "place_of",
    "request_for",
    "show",
]

WIDTH, HEIGHT, RADIUS = 160.0, 90.0, 7.0
STEPS_PER_UNIT = 10  # a place is told to 0.1 units: 0.3 mm on a 24" monitor
COLUMNS, ROWS = int(WIDTH * STEPS_PER_UNIT) + 1, int(HEIGHT * STEPS_PER_UNIT) + 1
NO_TARGET = 0  # of requests: none was asked for; of the sensor column `target_shown`: none is painted
DEFAULT_PORT = 8770
PAGE_PATH, ROBOT_PATH = "/page", "/robot"  # of the websockets


@dataclass(frozen=True, slots=True)
class Place:
    """Where the disc's middle is, in units."""

    x: float
    y: float


def draw_place(rng: np.random.Generator, margin: float) -> Place:
    """A place from which the whole disc is at least `margin` units from the screen's edges, uniform on the grid of
    places that can be told."""
    inset = round((RADIUS + margin) * STEPS_PER_UNIT)
    x, y = (int(rng.integers(inset, count - inset)) for count in (COLUMNS, ROWS))
    return Place(x / STEPS_PER_UNIT, y / STEPS_PER_UNIT)


def request_for(place: Place) -> int:
    """The request (`types.Command.request`) that moves the target there; 1 or more. `ValueError`: off the screen."""
    x, y = round(place.x * STEPS_PER_UNIT), round(place.y * STEPS_PER_UNIT)
    if not (0 <= x < COLUMNS and 0 <= y < ROWS):
        raise ValueError(f"{place} is not on the screen")
    return 1 + y * COLUMNS + x


def place_of(request: int) -> Place:
    """Where a request moves the target. `ValueError`: it is none for the target."""
    y, x = divmod(request - 1, COLUMNS)
    if not (request > NO_TARGET and y < ROWS):
        raise ValueError(f"request {request} is none for the target")
    return Place(x / STEPS_PER_UNIT, y / STEPS_PER_UNIT)


# What goes over the websockets, as JSON. Lengths as shares of the screen's width (x, radius) and height (y).


class Show(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="show"):
    """Robot to server to page: paint the disc there; `id` is the request."""

    id: int
    x: float
    y: float
    radius: float


class Painted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="painted"):
    """Page to server to robot: the disc of this id is on the screen."""

    id: int


class Pages(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="pages"):
    """Server to robot: so many pages are open."""

    count: int


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="refused"):
    """Server to robot, before it hangs up: why."""

    why: str


def show(request: int) -> Show:
    """What is sent for a request; `ValueError` as for `place_of`."""
    place = place_of(request)
    return Show(id=request, x=place.x / WIDTH, y=place.y / HEIGHT, radius=RADIUS / WIDTH)
