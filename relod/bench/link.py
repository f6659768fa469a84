"""`relod bench link`: what a cut of the link costs: time to notice it, to be back, and to deliver what has piled up.

A recorded Create run is sent at its own pace by a real RobotLink, through a relay, to a real `relod learner`. Cuts come
at seeded moments: a reset, of which both ends are told, and a silence, in which nothing passes and nothing closes.

    notice-*      from the beginning of the cut until the robot's link is down
    reconnect-*   from the moment at which the learner can be reached again until the link is up
    drain-*       from there until every record that waited then is acked
    greeting      beside them, in the same run: a new connection through the relay, until the learner's first message

A relay accepts connections during a silence, as a real network would not: there the robot asks again every 0.3 s. At
the end `audit` compares what was sent with the learner's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from ..config import LinkSettings
from ..errors import LinkLost, StartError
from ..runtime.clock import NS_PER_MS, monotonic_ns
from ..runtime.remote.link import greet_learner
from .cuts import ChainedRobot, CutWay
from .form import Findings, Series, positive, ratio
from .linkecho import create_spec
from .loadrobot import Recording, record

__all__ = ["ROUNDS", "SHORT_ROUNDS", "LinkRequest", "measure_link"]

ROUNDS, SHORT_ROUNDS = 25, 3
KINDS = ("reset", "silence")  # of each, in every round
RECORDED_STEPS = 600
BACK_LIMIT_S = 60.0
BETWEEN_S = (0.3, 1.2)  # from being back to the next cut
POLL_S = 0.0005  # resolution of draining
FOR_EVER_S = 36_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRequest:
    """What to measure: a reset and a silence in every round."""

    rounds: int = ROUNDS
    seed: int = 0

    def __post_init__(self) -> None:
        positive("--rounds", self.rounds)


def measure_link(request: LinkRequest) -> Findings:
    """Cut the link again and again; raises `LinkLost` when records are missing in the end."""
    with tempfile.TemporaryDirectory(prefix="relod-bench-") as folder:
        recording = record(Path(folder) / "recorded", RECORDED_STEPS)
        samples, facts = uvloop.run(_measure(Path(folder), request, recording))
    if facts["failure"] or not facts["delivered"] or facts["audit_exit_code"]:
        raise LinkLost(f"not all that was sent is in the learner's log: {facts['failure'] or facts['audit']}")
    records = facts["records"]
    return Findings(
        benchmark="link",
        parameters={"rounds": request.rounds, "seed": request.seed},
        samples={name: Series(values=values) for name, values in samples.items()},
        ratios={name: ratio("greeting", samples[name], samples["greeting"]) for name in samples if "reconnect" in name},
        facts=facts,
        notes=[
            f"{records['acked']:,} records, all in the learner's log once and in order; {records['resent']} sent twice",
            f"the link calls its learner silent after {LinkSettings().silence_s:g} s without a message",
        ],
    )


async def _measure(
    folder: Path, request: LinkRequest, recording: Recording
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    rng = random.Random(request.seed)
    samples: dict[str, list[float]] = {
        f"{what}-{kind}": [] for kind in KINDS for what in ("notice", "reconnect", "drain")
    }
    samples["greeting"] = []
    robot_folder = folder / "robot"
    robot_folder.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        way = CutWay(folder)
        stack.push_async_callback(way.close)
        url = await way.open()
        robot = ChainedRobot(url, robot_folder, recording)
        stack.callback(robot.close)
        stack.push_async_callback(robot.link.close, drain=False)
        await robot.link.open()
        driving = asyncio.create_task(robot.drive(monotonic_ns(), FOR_EVER_S, create_spec().cycle_ns), name="driving")
        stack.callback(driving.cancel)
        for _ in range(request.rounds):
            for kind in KINDS:
                await asyncio.sleep(rng.uniform(*BETWEEN_S))
                for name, value in (await _cut(way, robot, kind, rng)).items():
                    samples[f"{name}-{kind}"].append(value)
            samples["greeting"].append(await _greet(url))
        driving.cancel()
        return samples, await way.finish(robot)


async def _cut(way: CutWay, robot: ChainedRobot, kind: str, rng: random.Random) -> dict[str, float]:
    """Cut once, and wait until all that waited is delivered; milliseconds of each part."""
    began_ns = monotonic_ns()
    robot.down.clear()
    cutting = asyncio.create_task(way.silence(rng) if kind == "silence" else way.reset(rng), name=kind)
    try:
        async with asyncio.timeout(BACK_LIMIT_S):
            await robot.down.wait()
            returned_ns = await cutting
            await robot.up.wait()
            while robot.outbox.acked < robot.due:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise StartError(f"the link was not back {BACK_LIMIT_S:g} s after a {kind}: {robot.failure}") from None
    drained_ns = monotonic_ns()
    return {
        "notice": (robot.went_down_ns - began_ns) / NS_PER_MS,
        "reconnect": max(0.0, (robot.came_up_ns - returned_ns) / NS_PER_MS),
        "drain": (drained_ns - robot.came_up_ns) / NS_PER_MS,
    }


async def _greet(url: str) -> float:
    start_ns = monotonic_ns()
    await greet_learner(url, ca=None, settings=LinkSettings(), say=lambda text: None)
    return (monotonic_ns() - start_ns) / NS_PER_MS
