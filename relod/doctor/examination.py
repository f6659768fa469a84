"""All checks in order, and the report: a table for people, a document for programs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..errors import EXIT_OK, EXIT_START, SettingsError
from .devices import check_camera_source, check_cameras, check_port, check_ports
from .finding import Finding, Machine, State, guarded
from .network import check_learner, check_ur5, is_path
from .room import check_descriptors, check_disk, check_memory, check_shared_memory
from .software import check_gpu, check_opencv, check_packages, check_system, check_torch, load_torch
from .timing import (
    check_calendar,
    check_clock,
    check_cpu,
    check_governor,
    check_realtime,
    check_timers,
    measure_lateness_ms,
)

__all__ = ["Question", "Report", "examine"]

STYLES = {State.OK: "green", State.NOTE: "yellow", State.WRONG: "bold red", State.ABSENT: "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the command line names."""

    robot: str | None = None
    camera: str | None = None
    learner: str | None = None
    token_file: Path | None = None
    ca: Path | None = None
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; there may be notes."""
        return all(finding.state is not State.WRONG for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0, or 3 when something is wrong."""
        return EXIT_OK if self.passed else EXIT_START

    def counts(self) -> dict[str, int]:
        """How many findings of each state."""
        return {state.value: sum(finding.state is state for finding in self.findings) for state in State}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the keys stay."""
        checks = [
            {
                "name": finding.name,
                "subject": finding.subject,
                "state": finding.state.value,
                "found": finding.found,
                "mend": finding.mend,
                "values": finding.values,
            }
            for finding in self.findings
        ]
        head = {"relod": __version__, "host": platform.node(), "passed": self.passed, "counts": self.counts()}
        return {**head, "checks": checks}

    def print(self, console: Console) -> None:
        """The table; below it what mends things, on lines of their own so that they can be copied."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column("check", max_width=24, overflow="fold")
        table.add_column("state", no_wrap=True)
        table.add_column("found", ratio=1, overflow="fold")
        for finding in self.findings:
            shown = Text(finding.state.value, style=STYLES[finding.state])
            table.add_row(_text(finding.title), shown, _text(finding.found))
        console.print(table)
        for state, title in ((State.WRONG, "wrong"), (State.NOTE, "could be better")):
            self._print_steps(console, state, title)
        counts = ", ".join(f"{count} {state}" for state, count in self.counts().items() if count)
        verdict = Text("nothing is wrong", "green") if self.passed else Text("something is wrong", "bold red")
        console.print(Text.assemble(verdict, f": {counts}"))

    def _print_steps(self, console: Console, state: State, title: str) -> None:
        steps = [finding for finding in self.findings if finding.state is state and finding.mend]
        if steps:
            console.print(Text(title, style=STYLES[state]))
        for finding in steps:
            console.print(_text(f"  {finding.title}:"), soft_wrap=True)
            console.print(_text(f"    {finding.mend}"), soft_wrap=True)
        if steps:
            console.print()


def _text(line: str) -> Text:
    """A line as it is, without what could move the terminal's cursor: devices and hosts have written parts of it."""
    return Text("".join(each if each.isprintable() else "?" for each in line))


def examine(question: Question, machine: Machine | None = None) -> Report:
    """Look at this machine, and at what the question names; takes some seconds. Raises SettingsError on its options."""
    if question.learner is None and (question.token_file or question.ca):
        raise SettingsError("--token-file and --ca do nothing without --learner", "add --learner ws://HOST:PORT")
    machine = machine or Machine()
    # Timers before torch, whose threads and memory this process has afterwards.
    return Report(
        findings=(
            *guarded("system", lambda: check_system(machine)),
            *_look_at_timing(machine),
            *_look_at_room(machine),
            *_look_at_devices(machine, question),
            *_look_at_network(question),
            *_look_at_software(machine, question),
        )
    )


def _look_at_timing(machine: Machine) -> list[Finding]:
    return [
        *guarded("cpu", lambda: check_cpu(machine)),
        *guarded("governor", lambda: check_governor(machine)),
        *guarded("clock", lambda: check_clock(machine)),
        *guarded("calendar", check_calendar),
        *guarded("timers", lambda: check_timers(machine, measure_lateness_ms())),
        *guarded("real time", lambda: check_realtime(machine)),
    ]


def _look_at_room(machine: Machine) -> list[Finding]:
    def disk() -> Finding:
        from ..config import LogSettings, RunSettings

        return check_disk(Path(RunSettings().folder), LogSettings().limit_gib)

    return [
        *guarded("memory", lambda: check_memory(machine)),
        *guarded("shared memory", lambda: check_shared_memory(machine)),
        *guarded("open files", check_descriptors),
        *guarded("disk", disk),
    ]


def _look_at_devices(machine: Machine, question: Question) -> list[Finding]:
    camera, robot = question.camera, question.robot
    return [
        *(
            guarded("camera", lambda: check_cameras(machine))
            if camera is None
            else guarded("camera", lambda: check_camera_source(camera), camera)
        ),
        *(
            guarded("serial", lambda: check_port(machine, robot), robot)
            if robot is not None and is_path(robot)
            else guarded("serial", lambda: check_ports(machine))
        ),
    ]


def _look_at_network(question: Question) -> list[Finding]:
    found: list[Finding] = []
    robot, learner = question.robot, question.learner
    if robot is not None and not is_path(robot):
        found += check_ur5(robot)
    if learner is not None:
        found += guarded(
            "learner",
            lambda: check_learner(
                learner, token_file=question.token_file, ca=question.ca, environment=question.environment
            ),
            learner,
        )
    return found


def _look_at_software(machine: Machine, question: Question) -> list[Finding]:
    robot_only = question.learner is not None
    ur5 = question.robot is not None and not is_path(question.robot)
    torch = load_torch()
    return [
        *guarded("packages", lambda: check_packages(robot_only=robot_only, ur5=ur5)),
        *guarded("OpenCV", check_opencv),
        *guarded("torch", lambda: check_torch(torch, robot_only=robot_only)),
        *guarded("GPU", lambda: check_gpu(machine, torch)),
    ]
