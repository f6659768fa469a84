"""A run whose learner is on another host: experience goes over the link, policies or actions come back.

Imports torch only where the robot acts itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from ...config import flatten, load
from ...errors import LinkLost, RelodError, SettingsError, StartError
from ...packages import distribution
from ...robots import registry
from ...robots.vision import make_shrink
from ...types import EpisodeEnd, Frame, Step
from ..clock import monotonic_ns
from ..host import ChildSpec, Events, Opening, Result, RobotHost
from ..log.codec import make_codec
from ..log.format import EncodedFrame
from ..messages import Answered, Asked
from ..plan import Plan, Remote, Start
from ..progress import Progress
from ..rundir import RunFolder
from ..session import announce, finish, new_spans, open_folder
from ..spans import SpanWriter, Stage
from .asking import AskingHost
from .chain import ChainWriter
from .emulation import Relay
from .link import JoinFacts, RobotLink
from .linkprofile import profile_named
from .outbox import Outbox
from .wire import Answer, LearnerNews, Observe, Welcome

__all__ = ["run_remote"]

MIB = 1 << 20
FULL = "the outbox is full: waiting for the learner"

SUMMARY_FIGURES = (
    *("reconnects", "rtt_ms", "answer_ms", "uplink_bytes", "downlink_bytes"),
    *("clock_offset_ms", "clock_uncertainty_ms"),
)

Acts = Literal["robot", "learner"]


def run_remote(plan: Plan, arguments: tuple[str, ...], *, acts: Acts) -> Result:
    """Run on the wall clock with a learner elsewhere; `acts` is who answers observations."""
    announce(plan)
    start, spans = Start(), new_spans()
    with open_folder(plan, arguments) as folder:
        progress = Progress(plan, folder, spans.writer("parent"))
        learning = _RemoteLearning(plan, folder, start, acts, spans.writer("learner"))
        host = RobotHost(plan=plan, folder=folder, learning=learning, spans=spans, start=start, progress=progress)
        return finish(folder, host.run(), progress)


class _RemoteLearning:
    """`host.Learning` over a link."""

    def __init__(self, plan: Plan, folder: RunFolder, start: Start, acts: Acts, spans: SpanWriter) -> None:
        assert plan.remote is not None
        settings, spec = plan.settings, plan.task.spec
        self._plan, self._remote, self._folder, self._start, self._acts = plan, plan.remote, folder, start, acts
        self._spans = spans  # there is no learner here: the link stands for it
        self._run = secrets.token_hex(16)
        self._shrink = make_shrink(spec.image_hw)
        self._codec = make_codec(settings.log.codec, settings.log.jpeg_quality, image_hw=spec.image_hw)
        self._episode_open = self._finishing = self._lost = False
        self._outbox = Outbox(
            folder.path / "outbox",
            memory_bytes=int(settings.link.outbox_mib * MIB),
            spool_bytes=int(settings.link.spool_gib * 1024 * MIB),
        )
        self._chain = ChainWriter(folder.path / "steps.chain")
        self._holds: dict[str, str] = {}  # why no episode may begin, by who says so
        self._events: Events
        self._link: RobotLink | None = None
        self._relay: Relay | None = None
        self._welcome: Welcome | None = None
        self._publish: Callable[[npt.NDArray[np.float32], tuple[int, int]], object] = lambda values, version: None
        self._news: LearnerNews | None = None

    # -- start ---------------------------------------------------------------------------------------------------------

    async def open(self, events: Events) -> Opening:
        """Connect, waiting for the learner if need be."""
        self._events = events
        plan, remote = self._plan, self._remote
        if self._acts == "robot":  # before the link is up: it takes seconds, in which no ping would be sent
            await asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "relod.runtime.acting")
        self._link = RobotLink(
            await self._url(remote),
            token=remote.token,
            ca=remote.ca,
            join=JoinFacts(
                robot=remote.name,
                run=self._run,
                acts=self._acts,
                task=plan.task.spec,
                codec=plan.settings.log.codec,
                algorithm=plan.algorithm_name,
                presets=dict(plan.entry.presets),
            ),
            settings=plan.settings.link,
            outbox=self._outbox,
            events=self,
            spans=self._spans,
        )
        self._folder.update_run({"link_run": self._run, "learner_url": remote.url, "robot_name": remote.name})
        welcome = self._welcome = await self._link.open()
        self._folder.update_run(
            {
                "learner_run": welcome.learner,
                "learner_run_dir": welcome.run_dir,
                "algorithm": welcome.algorithm,
                "preset": welcome.preset,
                "agent": welcome.agent,
            }
        )
        if self._acts == "learner":
            return Opening(build_actor=AskingHost, seed=welcome.seed)
        return self._open_actor(welcome)

    async def _url(self, remote: Remote) -> str:
        """Where to connect to: the learner, or a relay that makes the link worse."""
        if remote.link is None:
            return remote.url
        target = urlsplit(remote.url)
        if target.scheme != "ws" or target.hostname is None:
            raise SettingsError(f"--link {remote.link} with {remote.url}", "an emulated link needs ws://HOST:PORT")
        relay, profile = Relay(), profile_named(remote.link)
        host, port = await relay.start(target.hostname, target.port or 80, profile, seed=self._plan.settings.run.seed)
        self._relay = relay
        return f"ws://{host}:{port}"

    def _open_actor(self, welcome: Welcome) -> Opening:
        """The actor with the learner's settings, and the box that its policies go into."""
        from ...algos.agent import policy_size
        from ...algos.checked import find_algorithm, policy_layout, rehearse_policy
        from ..acting import BoxActor
        from ..policy import PolicyBox, PolicyWriter

        plan, name = self._plan, self._plan.algorithm_name
        if not name:
            name = welcome.algorithm
            if ":" in name:  # what is imported here is for this host to say, not for a learner
                raise SettingsError(f"the learner teaches by {name}, which has no installed name", f"use --algo {name}")
        target = registry.target("algorithm", name)
        algorithm = find_algorithm(target)
        package = distribution(target)
        hint = f"install the same version of {(package or target).split()[0]} on both hosts"
        if package and welcome.package and package != welcome.package:
            raise StartError(f"{name} is of {welcome.package} at the learner, and of {package} here", hint)
        try:
            agent = load({"agent": algorithm.settings_type}, presets=[{"agent": welcome.agent}]).agent
        except SettingsError as error:
            raise StartError(f"the learner's settings do not fit {name} of this host: {error.message}", hint) from error
        spec = plan.task.spec
        policy = rehearse_policy(algorithm, spec, agent)
        size = policy_size(policy)
        if size != welcome.policy_size:
            raise StartError(
                f"the learner's policies have {welcome.policy_size} values, and {name} here has {size}", hint
            )
        if welcome.policy_layout not in ("", policy_layout(policy)):
            raise StartError(f"the learner's policies of {name} have as many values as here, but other layers", hint)
        box = PolicyBox(size)
        self._publish = PolicyWriter(box).publish
        if welcome.has_policy:
            self._hold("policy", "waiting for the learner's policy")
        build = BoxActor(
            algorithm=target,
            spec=spec,
            settings=agent,
            box=box,
            seed=welcome.seed,
            start=replace(self._start, step=welcome.env_steps),
            record_to=None,
        )
        needs = algorithm.needs(spec, agent)
        return Opening(build_actor=build, seed=welcome.seed, between_episodes=needs.between_episodes)

    def children(self) -> Sequence[ChildSpec]:
        """None: the worker is the learner's."""
        return ()

    # -- experience ----------------------------------------------------------------------------------------------------

    def add_frame(self, frame: Frame) -> None:
        """Keep a camera frame, encoded once; while the learner waits to answer, send it at once."""
        taken_ns = monotonic_ns()
        encoded = EncodedFrame(captured_ns=frame.captured_ns, data=self._codec.encode(self._shrink(frame.image)))
        self._spans.add(Stage.ENCODE, frame.id, taken_ns, monotonic_ns())
        self._outbox.add_frame(frame.id, encoded)
        if self._acts == "learner" and self._episode_open and self._link is not None:
            self._link.frame(frame.id)

    def add(self, message: Step | EpisodeEnd) -> None:
        """Into the outbox, and into the chain that says later what was delivered.

        After the first record that finds no room nothing is taken: the run ends, and a learner takes no gaps.
        """
        self._episode_open = isinstance(message, Step)
        if self._lost:
            return
        self._lost = True  # unless what follows succeeds
        if self._outbox.add(message):
            self._chain.add(message, self._outbox.frames)
        self._lost = False
        if self._outbox.full:
            self._hold("outbox", FULL)
        if self._link is not None:
            self._link.wake()

    def ask(self, question: Asked) -> None:
        """Send an observation on."""
        self._episode_open = True
        head = Observe(
            ask=question.now_ns,
            episode=question.episode,
            index=question.index,
            frame_ids=question.frame_ids,
            now_ns=question.now_ns,
        )
        if self._link is not None:
            self._link.ask(head, question.proprio)

    # -- what the link tells -------------------------------------------------------------------------------------------

    def policy(self, values: npt.NDArray[np.float32], version: tuple[int, int]) -> None:
        """A newer policy."""
        self._publish(values, version)
        self._hold("policy", "")

    def answer(self, head: Answer, values: bytes) -> None:
        """An action for the control process."""
        split = 4 * head.actions
        self._events.answer(
            Answered(asked_ns=head.ask, action=values[:split], extras=values[split:], policy_version=head.version)
        )

    def news(self, news: LearnerNews) -> None:
        """How learning goes."""
        self._news = news

    def link_state(self, up: bool) -> None:
        """Without a link nobody acts in remote-only; otherwise the robot goes on with the policy it has."""
        if self._finishing:
            return
        if self._acts == "learner":
            self._hold("link", "" if up else f"waiting for the learner at {self._remote.url}")

    def hold(self, reason: str) -> None:
        """The learner's own wish."""
        self._hold("learner", reason)

    def finished(self, reason: str) -> None:
        """The learner's run is over, and so is this one."""
        self._events.event("learner", f"finished: {reason}")
        self._events.end(None)

    def failed(self, error: RelodError) -> None:
        """The link is given up."""
        self._events.end(error)

    def say(self, text: str) -> None:
        """Something a person should read."""
        self._events.event("link", text)

    def _hold(self, who: str, reason: str) -> None:
        self._holds.pop(who, None)
        if reason:
            self._holds[who] = reason
        self._events.hold(next(iter(self._holds.values()), ""))

    # -- figures and end -----------------------------------------------------------------------------------------------

    def poll(self) -> dict[str, dict[str, float | str]]:
        """Figures of link and learner."""
        if self._link is None:
            return {}
        if "outbox" in self._holds and not self._outbox.full:
            self._hold("outbox", "")
        figures = {name: v if isinstance(v, str) else float(v or 0.0) for name, v in flatten(self._link.figures())}
        found = {"link": {**figures, **self._backlog(), "learner": self._remote.url}}
        if self._news is not None:
            news, self._news = self._news, None
            found["worker"] = {
                "updates": float(news.updates),
                "updates_per_s": news.updates_per_s,
                "replay_steps": float(news.replay_steps),
                "dropped": float(self._outbox.dropped),
                **{f"metric.{name}": value for name, value in news.metrics.items()},
            }
        return found

    def _backlog(self) -> dict[str, float | str]:
        return {"backlog": float(self._outbox.backlog), "backlog_bytes": float(self._outbox.backlog_bytes)}

    async def finish(self) -> None:
        """Deliver what is left; `LinkLost` when that takes too long, or when this is cancelled."""
        self._finishing = True
        self._hold("link", "")
        async with contextlib.AsyncExitStack() as closing:
            if self._relay is not None:
                closing.push_async_callback(self._relay.close)
            closing.callback(self._chain.close)
            closing.callback(self._outbox.close)
            if self._link is None or self._welcome is None:
                return
            delivered = False
            with contextlib.suppress(asyncio.CancelledError):  # somebody is in a hurry, and is told all the same
                delivered = await self._link.close(drain=True)
            if not delivered and not self._outbox.empty:
                raise LinkLost(
                    f"{self._outbox.backlog} steps and ends of episodes were not delivered to {self._remote.url}",
                    f"they are kept in {self._folder.path / 'outbox'}, for reading only",
                )

    def summary(self) -> dict[str, Any]:
        """Counts of the link and who the learner is."""
        outbox, welcome = self._outbox, self._welcome
        figures = self._link.figures() if self._link is not None else {}
        return {
            "learner": self._remote.url,
            "algorithm": welcome.algorithm if welcome is not None else "",
            "preset": welcome.preset if welcome is not None else "",
            "link_profile": self._remote.link or "",
            "sent": outbox.sent,
            "acked": outbox.acked,
            "resent": outbox.resent,
            "duplicates": outbox.duplicates,
            "backlog_max": outbox.backlog_max,
            "steps_dropped": outbox.dropped,
            "relay": self._relay.figures() if self._relay is not None else None,
            **{name: figures[name] for name in SUMMARY_FIGURES if name in figures},
        }
