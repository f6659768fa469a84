"""A task in virtual time behind Gymnasium's interface: the same cycle, limits, resets and world as in a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from ..loading import load_attribute
from ..robots.vision import make_shrink
from ..runtime.clock import NS_PER_S, VirtualClock
from ..runtime.cycle import Cycle, Tick
from ..runtime.remote.asking import AskingHost
from ..runtime.request import task_settings
from ..runtime.virtual import WRITE_NS, Senses, World
from ..seeds import random_stream
from ..types import Action, EpisodeEnd, FloatArray, Image, Observation
from .spaces import RENDER_MODES, action_space, observation_space, observe, to_rgb

__all__ = ["VirtualEnv"]

RESET_CYCLES = 100_000  # over an hour of cycles: a reset that takes longer never ends


class VirtualEnv(gymnasium.Env[Any, Any]):
    """A task by name. As fast as the machine, and the same for the same seed.

    Args:
        task: a name, or "module:attribute".
        images: whether observations hold images beside the vector.
        world: ideal, nominal or harsh.
        settings: further ones, each `A.B=C`.
    """

    def __init__(
        self,
        task: str,
        *,
        images: bool = True,
        world: str = "nominal",
        settings: Sequence[str] = (),
        render_mode: str | None = None,
    ) -> None:
        self._entry, self._settings = task_settings(task, world, None, {}, tuple(settings))
        self._spec = self._entry.make_task(self._settings.task).spec
        self.metadata = {"render_modes": RENDER_MODES, "render_fps": round(NS_PER_S / self._spec.cycle_ns)}
        self.render_mode = render_mode
        self.action_space = action_space(self._spec)
        self.observation_space = observation_space(self._spec, images)
        self._images = images
        self._cycle: Cycle | None = None
        self._world: World
        self._senses: Senses
        self._clock: VirtualClock
        self._asked: Observation | None = None
        self._newest: Image | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Bring the robot to the start of an episode. A seed, and the first call, make a new world."""
        super().reset(seed=seed)
        if seed is not None or self._cycle is None:
            self._begin(int(self.np_random.integers(2**31)))
        elif self._asked is not None:
            assert self._cycle is not None
            self._cycle.cut("the caller began anew")
            self._world.begin_episode()
        self._asked = None
        for _ in range(RESET_CYCLES):
            tick = self._tick()
            if tick.asked is not None:
                self._asked = tick.asked
                return self._observed(tick.asked), {}
        raise RuntimeError("the reset does not end")

    def step(self, action: FloatArray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One action cycle. The last observation is the true last one of the episode."""
        if self._cycle is None or self._asked is None:
            raise gymnasium.error.ResetNeeded("call reset() first")
        values = np.asarray(action, np.float32)
        if values.shape != (self._spec.action_dim,):
            raise ValueError(f"an action of shape {values.shape}, where {(self._spec.action_dim,)} is expected")
        now_ns = self._clock.now_ns()
        command = self._cycle.answer(Action(values=values), self._asked.now_ns, now_ns)
        assert command is not None
        self._world.execute(command, now_ns + WRITE_NS)
        tick = self._tick()
        self._asked = tick.asked
        if tick.step is None:  # the senses failed: the episode is cut, and its last step has no outcome
            reason = tick.end.reason if tick.end is not None else tick.event
            return self._last_seen(tick.end), 0.0, False, True, {"success": False, "reason": reason}
        info = {"success": tick.end is not None and tick.end.success, "reason": tick.end.reason if tick.end else ""}
        return self._seen(tick), tick.step.reward, tick.step.terminated, tick.step.truncated, info

    def render(self) -> Image | None:
        """The newest camera picture, `(H, W, 3) uint8` RGB."""
        return None if self.render_mode is None or self._newest is None else to_rgb(self._newest)

    # How.

    def _begin(self, seed: int) -> None:
        entry, settings, spec = self._entry, self._settings, self._spec
        self._clock = VirtualClock()
        self._world = load_attribute(entry.world, "the simulated world")(settings.sim, seed, spec, NS_PER_S)
        self._senses = Senses(spec, entry.sensor_names)
        self._frames: dict[int, Image] = {}
        self._shrink = make_shrink(spec.image_hw)
        self._cycle = Cycle(
            task=entry.make_task(settings.task),
            actor=AskingHost(),
            safety=settings.safety,
            rng=random_stream(seed, "reset"),
            shrink=self._shrink,
        )

    def _tick(self) -> Tick:
        """The next cycle; the command of one that asks comes by `step`."""
        assert self._cycle is not None
        now_ns = self._clock.now_ns() + self._spec.cycle_ns
        self._clock.advance_to(now_ns)
        for frame in self._senses.take(*self._world.advance(now_ns)):
            self._newest = frame.image
            self._frames[frame.id] = self._shrink(frame.image)
        for old in sorted(self._frames)[: -2 * self._spec.frames]:
            del self._frames[old]
        tick = self._cycle.tick(now_ns, self._senses.inputs())
        if tick.asked is None:
            self._world.execute(tick.command, now_ns + WRITE_NS)
        if tick.end is not None:
            self._world.begin_episode()
        return tick

    def _observed(self, seen: Observation) -> Any:
        return observe(seen.images, seen.proprio, self._images)

    def _seen(self, tick: Tick) -> Any:
        return self._observed(tick.asked) if tick.asked is not None else self._last_seen(tick.end)

    def _last_seen(self, end: EpisodeEnd | None) -> Any:
        assert end is not None
        return observe(tuple(self._frames[i] for i in end.frame_ids), end.proprio, self._images)
