"""The composition root: what a mode wires to what. Nothing outside this file asks which mode it is in.

The robot side always does sensor -> observation -> action -> actuator, the learner side always transition -> replay ->
update -> policy. A mode decides who answers an observation and who learns; each is one function here.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..config import Section, Settings, describe
from ..robots import registry
from .plan import Plan, Remote
from .remote.wire import Challenge
from .request import Place, Request, make_plan, task_settings

__all__ = [
    "MODES",
    "describe_modes",
    "describe_settings",
    "resolve",
    "run_check",
    "run_emulator",
    "run_robot",
    "run_target",
]


def run_robot(request: Request) -> Any:
    """Run `relod robot`; returns a `host.Result`."""
    plan = resolve(request)
    if plan.remote is not None:
        plan = resolve(request, _greet(plan.remote, plan.settings))
    return MODES[plan.mode].run(plan, request.arguments)


def resolve(request: Request, learner: Challenge | None = None) -> Plan:
    """The plan of a run in one of these modes; see `request.make_plan`."""
    return make_plan(request, {name: mode.place for name, mode in MODES.items()}, learner)


def _greet(remote: Remote, settings: Settings) -> Challenge:
    """What the learner says of itself; waits for it."""
    import uvloop

    from .remote.link import greet_learner

    def say(text: str) -> None:
        print(f"relod: {text}", file=sys.stderr)

    return uvloop.run(greet_learner(remote.url, ca=remote.ca, settings=settings.link, say=say))


# -- modes -----------------------------------------------------------------------------------------------------------


def local_only(plan: Plan, arguments: tuple[str, ...]) -> Any:
    """Actor in the control process, replay in this process, updates in a worker on this host."""
    from .checkpoint import find_checkpoint
    from .experience import check_room
    from .learner import LearnerSide
    from .localsession import run_wall
    from .session import announce, new_spans, open_folder
    from .virtualsession import run_virtual

    announce(plan)
    check_room(plan.learner)
    checkpoint = find_checkpoint(plan.learner)
    if plan.clock == "virtual":
        return run_virtual(plan, arguments, checkpoint)
    spans = new_spans()
    with open_folder(plan, arguments) as folder, LearnerSide(plan.learner, folder.path, spans) as learner:
        return run_wall(plan, folder, learner, spans, checkpoint)


def remote_local(plan: Plan, arguments: tuple[str, ...]) -> Any:
    """Actor in the control process; experience goes over the link, policies come back."""
    from .remote.robotsession import run_remote

    return run_remote(plan, arguments, acts="robot")


def remote_only(plan: Plan, arguments: tuple[str, ...]) -> Any:
    """Observations and experience go over the link, actions come back; no torch on this host."""
    from .remote.robotsession import run_remote

    return run_remote(plan, arguments, acts="learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A row of the table of modes."""

    run: Callable[[Plan, tuple[str, ...]], Any]
    place: Place
    acts: str
    learns: str
    on_robot: tuple[str, ...]  # processes on the robot's host, without the simulated world's
    on_learner: tuple[str, ...] = ()


DRIVING = ("parent", "control", "device", "guard", "camera", "sentinel")

MODES = {
    "local-only": Mode(
        run=local_only,
        place=Place(acts_here=True, learns_here=True),
        acts="actor in the control process",
        learns="update worker on the robot's host, by shared memory",
        on_robot=(*DRIVING, "worker"),
    ),
    "remote-local": Mode(
        run=remote_local,
        place=Place(acts_here=True, learns_here=False),
        acts="actor in the control process, policies come over the link",
        learns="the learner's update worker",
        on_robot=DRIVING,
        on_learner=("learner", "worker"),
    ),
    "remote-only": Mode(
        run=remote_only,
        place=Place(acts_here=False, learns_here=False),
        acts="the learner, over the link",
        learns="the learner's update worker",
        on_robot=DRIVING,
        on_learner=("learner", "worker"),
    ),
}


def describe_modes() -> list[dict[str, Any]]:
    """Who acts, who learns, and which processes run where, by mode."""
    return [
        {
            "mode": name,
            "acts": mode.acts,
            "learns": mode.learns,
            "on_robot": list(mode.on_robot),
            "on_learner": list(mode.on_learner),
        }
        for name, mode in MODES.items()
    ]


def describe_settings(task: str, algorithm: str) -> Iterator[tuple[str, Any, str]]:
    """Every setting as (name, default, description); the agent's defaults before any preset."""
    sections: dict[str, type[Section]] = {
        **registry.task(task).sections(),
        "agent": registry.algorithm(algorithm).settings_type,
    }
    for name, default, text in describe(sections):
        yield name, msgspec.to_builtins(default), text


# -- other commands ---------------------------------------------------------------------------------------------------


def run_emulator(
    *,
    task: str,
    world: str,
    seed: int,
    config: Path | None,
    environment: Mapping[str, str],
    assignments: tuple[str, ...],
    options: Mapping[str, Any],
) -> int:
    """A simulated robot alone, until Ctrl-C or SIGTERM; prints a JSON line that says where it is.

    `options`: further arguments of the task's emulator.
    """
    import uvloop

    entry, settings = task_settings(task, world, config, environment, assignments)
    spec = entry.make_task(settings.task).spec
    serve = registry.load_attribute(entry.emulator, f"the emulator of {task!r}")

    def ready(where: Mapping[str, str]) -> None:
        print(msgspec.json.encode(where).decode(), flush=True)
        told = f"--task {task} --robot {where['port']} --camera {where['camera_url']}"
        print(f"relod: a simulated robot; drive it with your own program, or with: relod robot {told}", file=sys.stderr)

    async def run() -> None:
        await serve(
            settings.sim,
            seed,
            spec,
            on_ready=ready,
            stop=_until_signalled(),
            new_episode=asyncio.Event(),
            **options,
        )

    uvloop.run(run())
    return 0


def run_target(listen: str) -> None:
    """Serve the page with the UR5's target, until Ctrl-C or SIGTERM; prints a JSON line that says where it is."""
    import uvloop

    from ..robots.ur5.targetpage import serve_target
    from .remote.access import split_address, url_of

    host, port = split_address(listen)

    def say(text: str) -> None:
        print(f"relod: {text}", file=sys.stderr)

    def ready(port: int) -> None:
        url = url_of("http", host, port)
        print(msgspec.json.encode({"url": url}).decode(), flush=True)
        say(f"open {url} in the monitor's browser, full screen; on the robot: --set robot.target=HOST:{port}")

    async def run() -> None:
        await serve_target(host, port, on_ready=ready, on_event=say, stop=_until_signalled())

    uvloop.run(run())


def _until_signalled() -> asyncio.Event:
    """An event that Ctrl-C and SIGTERM set."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def run_check(
    *,
    task: str,
    robot: str,
    camera: str | None,
    yes: bool,
    config: Path | None,
    environment: Mapping[str, str],
    assignments: tuple[str, ...],
    confirm: Callable[[str], bool],
) -> tuple[dict[str, Any], int]:
    """Commission the robot at `robot`; returns the JSON document and the exit code."""
    import tempfile

    from rich.console import Console

    from .cameratrial import CameraPlan
    from .check import run_check as commission
    from .trial import TrialPlan

    entry, settings = task_settings(task, "nominal", config, environment, assignments)
    height, width = entry.make_task(settings.task).spec.camera_hw
    with tempfile.TemporaryDirectory(prefix="relod-check-") as folder:
        plan = TrialPlan(
            driver=entry.driver,
            address=robot,
            settings=settings.robot,
            safety=settings.safety,
            robot=registry.load_attribute(entry.commissioning, f"the commissioning of {task!r}")(),
            log_path=Path(folder) / "device.log",
        )
        seen = (
            CameraPlan(source=camera, settings=settings.camera, height=height, width=width)
            if camera is not None
            else None
        )
        result = commission(plan, seen, console=Console(stderr=True), confirm=(lambda text: True) if yes else confirm)
    return result.to_dict(), result.exit_code
