"""What the user asked of `relod learner`, resolved: algorithm and settings, address, token and certificates.

The task is not among it: that is for the first robot to say, and its plan is made then.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ...config import Settings, load
from ...errors import SettingsError, StartError
from ...robots import registry
from ...types import TaskSpec
from ..plan import LearnerPlan, Resume
from ..request import choose_preset, one_of, resumed_settings
from ..rundir import read_run
from .access import (
    TOKEN_VARIABLE,
    find_token,
    is_loopback,
    make_token,
    read_token,
    server_tls,
    split_address,
    url_of,
)
from .wire import Join

__all__ = ["Access", "LearnerRequest", "Teaching", "choose_access", "choose_teaching"]

MODE = "learner"  # in run.json, where robots have theirs
TOKEN_FILE = "learner.token"  # in the folder of the runs, so that the next learner has the same
ROBOTS_OWN = frozenset({"task", "robot", "sim"})  # sections of settings that a learner has none of
SUGGESTED = frozenset({"agent"})  # the section for which a robot may suggest what suits its task

# Settings that a resumed run may change: what they say holds for one session, not for what was learned from.
MAY_CHANGE = ("run.steps", "run.minutes", "run.metrics_every_s", "run.tensorboard", "learner.", "safety.", "server.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerRequest:
    """What the user asked of `relod learner`, unresolved; None where nothing was said."""

    listen: str  # HOST:PORT
    algorithm: str | None
    preset: str | None
    profile: str | None
    token_file: Path | None
    cert: Path | None
    key: Path | None
    resume: Path | None
    config: Path | None
    environment: Mapping[str, str]
    assignments: tuple[str, ...]
    overrides: Mapping[str, Any]
    arguments: tuple[str, ...]


# -- what is taught ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """Algorithm and settings, before a robot has said what the task is."""

    request: LearnerRequest
    algorithm_name: str
    algorithm: Any  # algos.agent.Algorithm
    preset: str
    preset_reason: str
    settings: Settings  # without what a robot suggests for its task
    learner_id: str = field(default_factory=lambda: secrets.token_hex(16))  # of the run
    resume: Resume | None = None
    spec: TaskSpec | None = None  # of the run that goes on

    @property
    def image_hw(self) -> tuple[int, int] | None:
        """The images that the preset's networks are made for."""
        sizes = self.algorithm.presets[self.preset].get("task", {})
        if not {"image_height", "image_width"} <= sizes.keys():
            return None
        return sizes["image_height"], sizes["image_width"]

    def plan(self, join: Join) -> LearnerPlan:
        """The plan of a new run for the first robot's task.

        Raises:
            SettingsError: what the robot suggests cannot be used.
        """
        suggested = join.presets.get(self.preset, {})
        if foreign := sorted(suggested.keys() - SUGGESTED - ROBOTS_OWN):
            raise SettingsError(
                f"robot {join.robot} suggests settings in the section {foreign[0]!r}", "a task's presets set agent.*"
            )
        settings = _load(self.request, self.algorithm, self.preset, suggested, codec=join.codec)
        return self._plan(join.task, settings)

    def resumed_plan(self) -> LearnerPlan:
        """The plan of the run that goes on."""
        assert self.spec is not None
        return self._plan(self.spec, self.settings)

    def _plan(self, spec: TaskSpec, settings: Settings) -> LearnerPlan:
        return LearnerPlan(
            task_name=spec.name,
            spec=spec,
            algorithm_name=self.algorithm_name,
            algorithm_target=registry.target("algorithm", self.algorithm_name),
            algorithm=self.algorithm,
            preset=self.preset,
            preset_reason=self.preset_reason,
            settings=settings,
            resume=self.resume,
            robots=settings.server.max_robots,
        )

    def describe(self, plan: LearnerPlan) -> dict[str, Any]:
        """What run.json says of a new run, beside `provenance.describe`; `choose_teaching` reads it back."""
        return {
            "task": plan.task_name,
            "mode": MODE,
            "clock": "wall",
            "algorithm": plan.algorithm_name,
            "algorithm_target": plan.algorithm_target,
            "preset": plan.preset,
            "preset_reason": plan.preset_reason,
            "device": "robots over links",
            "world": "",
            "learner": self.learner_id,
            "spec": msgspec.to_builtins(plan.spec),
        }


def choose_teaching(request: LearnerRequest) -> Teaching:
    """Look up the algorithm and load the settings.

    Raises:
        SettingsError: names, values or combinations that cannot be used.
        StartError: the run to resume is none.
    """
    if request.resume is not None:
        return _resumed(request, request.resume.resolve())
    name = request.algorithm or "sac"
    algorithm = registry.algorithm(name)
    preset, reason = choose_preset(request.preset, algorithm.presets)
    return Teaching(
        request=request,
        algorithm_name=name,
        algorithm=algorithm,
        preset=preset,
        preset_reason=reason,
        settings=_load(request, algorithm, preset, {}),
    )


def _load(
    request: LearnerRequest, algorithm: Any, preset: str, suggested: Mapping[str, Any], *, codec: str | None = None
) -> Settings:
    trees = [algorithm.presets[preset], suggested]
    if request.profile is not None:
        trees.append(algorithm.profiles[one_of(request.profile, tuple(algorithm.profiles), "profile")])
    settings = load(
        {"agent": algorithm.settings_type},
        presets=[{name: tree[name] for name in tree if name not in ROBOTS_OWN} for tree in trees],
        file=request.config,
        environment=request.environment,
        assignments=request.assignments,
        overrides={**request.overrides, **({} if codec is None else {"log.codec": codec})},
    )
    if settings.run.record:
        raise SettingsError("run.record is for robots", "leave it out: a learner keeps a log in any case")
    if settings.run.realtime:
        raise SettingsError("run.realtime is for robots", "leave it out: a learner has no deadlines")
    return settings


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What run.json says that a learner needs to go on."""

    mode: str
    algorithm: str
    preset: str
    preset_reason: str
    learner: str
    spec: TaskSpec


def _resumed(request: LearnerRequest, folder: Path) -> Teaching:
    """The teaching of a run that goes on; it keeps what it was learned from."""
    run = read_run(folder)
    if run.get("mode") != MODE or not (folder / "log").is_dir():
        raise StartError(
            f"{folder} is no learner's run, or has no experience log", "resume a robot's with `relod robot --resume`"
        )
    try:
        saved = msgspec.convert(run, _Saved)
    except msgspec.ValidationError as error:
        raise StartError(f"{folder / 'run.json'} is damaged: {error}", "this run cannot be resumed") from error
    for option, asked, there in (
        ("algorithm", request.algorithm, saved.algorithm),
        ("preset", request.preset, saved.preset),
        ("profile", request.profile, None),
        ("config", request.config, None),
    ):
        if asked is not None and asked != there:
            raise SettingsError(f"--{option} {asked} with --resume", "a resumed run keeps its settings; leave it out")
    algorithm = registry.algorithm(saved.algorithm)
    return Teaching(
        request=request,
        algorithm_name=saved.algorithm,
        algorithm=algorithm,
        preset=saved.preset,
        preset_reason=saved.preset_reason,
        settings=resumed_settings(request, {"agent": algorithm.settings_type}, folder, MAY_CHANGE),
        learner_id=saved.learner,
        resume=Resume(folder=folder, session=len(run.get("sessions", [])) + 1),
        spec=saved.spec,
    )


# -- who may come ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where a learner listens, and what robots must know and bring."""

    host: str
    port: int  # 0: any
    token: bytes | None = field(repr=False)  # None: none is asked for
    token_file: Path | None
    tls: ssl.SSLContext | None

    def url(self, port: int) -> str:
        """What robots give as --learner; the address that other hosts see, where all of them are listened on."""
        return url_of("ws" if self.tls is None else "wss", self.host, port)

    def tell_how_to_join(self, url: str, say: Callable[[str], None]) -> None:
        """The lines a person at the robot needs."""
        say(f"listening at {url}")
        token = f" --token-file {self.token_file}" if self.token_file is not None else ""
        say(f"on a robot: relod robot --task TASK --mode remote-local --learner {url}{token}")
        if self.token_file is not None:
            say(f"robots on other hosts need a copy of {self.token_file.resolve()}, readable by its owner only")
        elif self.token is not None:
            say(f"robots need the same {TOKEN_VARIABLE}, or a file with it for --token-file")


def choose_access(request: LearnerRequest, runs: Path) -> Access:
    """Address, token and certificates. A token is made where others could connect and none was given.

    Args:
        runs: the folder of the runs, where a token that was made is kept.

    Raises:
        SettingsError: no address, or a certificate without its key.
        StartError: a file cannot be used, or the token cannot be written.
    """
    host, port = split_address(request.listen)
    if (request.cert is None) != (request.key is None):
        raise SettingsError("--cert and --key belong together", "give both, or neither")
    token, token_file = find_token(request.token_file, request.environment), request.token_file
    if token is None and not is_loopback(host):
        token_file = runs / TOKEN_FILE
        token = read_token(token_file) if token_file.exists() else make_token(token_file)
    return Access(
        host=host,
        port=port,
        token=token,
        token_file=token_file,
        tls=server_tls(request.cert, request.key) if request.cert is not None and request.key is not None else None,
    )
