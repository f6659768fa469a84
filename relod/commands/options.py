"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AlgorithmOption",
    "CameraOption",
    "ConfigOption",
    "ControlOption",
    "JsonOption",
    "LogArgument",
    "MixedOption",
    "MjpegOption",
    "PresetOption",
    "ProfileOption",
    "RobotOption",
    "RunSeedOption",
    "SeedOption",
    "SetOption",
    "TaskOption",
    "TimingOption",
    "TokenOption",
    "WorldOption",
]

TaskOption = Annotated[str, typer.Option(help="What to learn: a name, or module:attribute.")]
ConfigOption = Annotated[Path | None, typer.Option(help="Settings in TOML.", metavar="FILE")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, for example task.target_fraction=0.2.", metavar="A.B=C")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout at the end.")]
RobotOption = Annotated[
    str | None,
    typer.Option(
        help="Address of the robot, for example /dev/ttyUSB0. Without it the world is simulated.", metavar="ADDRESS"
    ),
]
CameraOption = Annotated[
    str | None, typer.Option(help="Camera: sim, a V4L2 device (0, /dev/video0) or an MJPEG URL.", metavar="SOURCE")
]
ControlOption = Annotated[Path | None, typer.Option(help="Unix socket for fault injection (JSON lines).")]
MjpegOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Serve the camera as MJPEG on 127.0.0.1; 0 = any free port.")
]
WorldOption = Annotated[str, typer.Option(help="ideal, nominal or harsh.")]
SeedOption = Annotated[int, typer.Option(min=0)]
AlgorithmOption = Annotated[
    str | None,
    typer.Option(
        "--algorithm", "--algo", help="How to learn: a name, or module:attribute. Default: sac, or the learner's."
    ),
]
PresetOption = Annotated[
    str | None, typer.Option(help="The algorithm's settings to start from; chosen by the machine if not given.")
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        help="Further settings, on top of the preset: laptop or jnano-em for a weaker learner; upstream of the ur5"
        " tasks for their published code's."
    ),
]
TimingOption = Annotated[
    bool,
    typer.Option("--timing", help="Say at the end where the time went, stage by stage; a bare --profile is the same."),
]
RunSeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of every random stream.")]
LogArgument = Annotated[Path, typer.Argument(help="Folder of a run, for example runs/latest.")]
TokenOption = Annotated[
    Path | None,
    typer.Option(help="File with the token that robot and learner share; or set RELOD_TOKEN.", metavar="FILE"),
]
MixedOption = Annotated[
    bool, typer.Option("--allow-mixed", help="Allow a real robot with a simulated camera, or the other way round.")
]
