"""Episodes of a task in virtual time without a learner, for benchmarks of what an actor earns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from relod.config import Settings
from relod.loading import load_attribute
from relod.robots.registry import TaskEntry
from relod.robots.vision import make_shrink
from relod.runtime.clock import NS_PER_S
from relod.runtime.cycle import Cycle
from relod.runtime.virtual import VirtualRun
from relod.seeds import random_stream
from relod.types import Actor, EpisodeEnd


def virtual_episodes(
    entry: TaskEntry, settings: Settings, seed: int, build_actor: Callable[[Any], Actor]
) -> Iterator[EpisodeEnd]:
    """The whole episodes of one run, as they end; without limit. `build_actor` is given the world."""
    task = entry.build(settings.task)
    world = load_attribute(entry.world, "the simulated world")(settings.sim, seed, task.spec, NS_PER_S)
    cycle = Cycle(
        task=task,
        actor=build_actor(world),
        safety=settings.safety,
        rng=random_stream(seed, "reset"),
        shrink=make_shrink(task.spec.image_hw),
    )
    run = VirtualRun(
        cycle=cycle,
        world=world,
        spec=task.spec,
        sensor_names=entry.sensor_names,
        on_frames=lambda frames: None,
        on_tick=lambda now_ns, inputs, tick: None,
    )
    return (tick.end for tick in run.ticks() if tick.end is not None)
