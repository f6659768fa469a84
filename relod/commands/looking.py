"""What can be looked at without a robot: runs, logs, what is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import StartError
from .options import (
    CameraOption,
    JsonOption,
    LogArgument,
    TaskOption,
    TokenOption,
)
from .output import end, print_columns, print_json, print_rows, print_table

__all__ = ["app"]

app = typer.Typer()
log = typer.Typer(help="The experience log of a run: sum it up, check it, export it.", no_args_is_help=True)
app.add_typer(log, name="log")


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders of run folders.", metavar="RUN...", show_default=False)
    ],
    x: Annotated[str, typer.Option("--x", help="experience: minutes in episodes. wall: minutes since the start.")] = (
        "experience"
    ),
    out: Annotated[
        Path | None,
        typer.Option(help="PNG or SVG to draw; learning-curves.png if not given, none with --json.", metavar="FILE"),
    ] = None,
    group: Annotated[
        str, typer.Option(help="auto: runs that differ only in seed, length and folder are one curve. none: each is.")
    ] = "auto",
    window: Annotated[int, typer.Option(min=1, help="Episodes of the running mean.")] = 20,
    reference: Annotated[
        list[str] | None, typer.Option(help="A horizontal line, for example random=-553.", metavar="NAME=VALUE")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the learning curves of several runs in one picture; runs may still be going."""
    from ..runtime import experiments
    from ..runtime.plot import PlotOptions, parse_reference, write_picture

    options = PlotOptions(
        out=out or Path("learning-curves.png"),
        x=x,
        window=window,
        references=tuple(parse_reference(text) for text in reference or ()),
    )
    found, empty = experiments.find_runs(runs)
    for folder in empty:
        print(f"relod: left out, no episode yet: {folder}", file=sys.stderr)
    groups = experiments.group_runs(found, group)
    if out is not None or not as_json:
        write_picture(groups, options)
        print(f"relod: learning curves: {options.out}", file=sys.stderr)
    if as_json:
        print_json({"groups": experiments.describe(groups)})


@log.command("info")
def log_info(run: LogArgument, as_json: JsonOption = False) -> None:
    """Sum up what is in the log."""
    from ..runtime.log.check import describe_log

    document = describe_log(run)
    if as_json:
        print_json(document)
        return
    print_table(document)


@log.command("verify")
def log_verify(run: LogArgument, as_json: JsonOption = False) -> None:
    """Check every checksum, frame, step and episode; exit code 3 when something is wrong."""
    from ..runtime.log.check import check_log

    document, faults = check_log(run)
    if as_json:
        print_json(document)
    else:
        print_table(document)
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise StartError(f"{faults[0]}{more}", f"what is whole can be saved: relod log export {run} --out DIR")


@log.command("export")
def log_export(
    run: LogArgument,
    out: Annotated[Path, typer.Option(help="New folder for the files.", metavar="DIR")],
    frames: Annotated[str, typer.Option(help="What becomes of the frames: png, mp4 or none.")] = "none",
    episodes: Annotated[
        str | None, typer.Option(help="Only the episodes numbered A up to and without B.", metavar="A:B")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the steps as NumPy files, one per episode, with an index in JSON."""
    from ..runtime.log.export import export_log

    index = export_log(run, out, frames=frames, episodes=episodes)
    if as_json:
        print_json(index)
    else:
        print(f"episodes: {len(index['episodes'])}, in {out} with index.json")


@app.command()
def doctor(
    robot: Annotated[
        str | None,
        typer.Option(help="Also this robot: a serial port, or the host of a UR controller.", metavar="ADDRESS"),
    ] = None,
    camera: CameraOption = None,
    learner: Annotated[
        str | None, typer.Option(help="Also the way to this learner: ws://HOST:PORT or wss://.", metavar="URL")
    ] = None,
    token_file: TokenOption = None,
    ca: Annotated[Path | None, typer.Option("--ca", help="Certificate to trust, for wss://.", metavar="FILE")] = None,
    as_json: JsonOption = False,
) -> None:
    """What is wrong on this machine for relod, and what mends it; nothing moves. Exit code 3 when something is."""
    from rich.console import Console

    from ..doctor.examination import Question, examine

    question = Question(
        robot=robot, camera=camera, learner=learner, token_file=token_file, ca=ca, environment=dict(os.environ)
    )
    report = examine(question)
    if as_json:
        print_json(report.to_dict())
    else:
        report.print(Console())
    end(report.exit_code)


@app.command()
def modes(as_json: JsonOption = False) -> None:
    """Which process runs where in each mode."""
    from ..runtime.modes import describe_modes

    table = describe_modes()
    if as_json:
        print_json({"modes": table})
        return
    for row in table:
        print(row["mode"])
        for title, what in (("acts", row["acts"]), ("learns", row["learns"])):
            print(f"  {title:12}{what}")
        for title, names in (("on robot", row["on_robot"]), ("on learner", row["on_learner"])):
            print(f"  {title:12}{', '.join(names) or 'nothing'}")


@app.command()
def tasks(as_json: JsonOption = False) -> None:
    """The tasks that are installed: relod's own, and those of other packages."""
    from ..runtime.listing import list_tasks

    def line(row: dict[str, Any]) -> str:
        images = "x".join(map(str, row["images"]))
        return f"{row['robot']}, every {row['cycle_ms']:g} ms, images {images}, {len(row['actions'])} actions"

    print_rows("tasks", list_tasks(), line, as_json)


@app.command()
def algos(as_json: JsonOption = False) -> None:
    """The algorithms that are installed: relod's own, and those of other packages."""
    from ..runtime.listing import list_algorithms

    print_rows("algorithms", list_algorithms(), lambda row: f"presets {', '.join(row['presets'])}", as_json)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """The runs in a folder and their state: running, ended, or interrupted and able to go on."""
    from ..runtime.listing import list_runs

    rows = list_runs(folder)
    if as_json:
        print_json({"runs": rows})
        return
    lines = [["run", "state", "task", "mode", "preset", "episodes", "minutes", "mean of last 20"]]
    for row in rows:
        state = f"{row['state']}, exit code {row['exit_code']}" if row.get("exit_code") else row["state"]
        names = ("task", "mode", "preset", "episodes", "experience_minutes", "mean_return_of_last_20")
        lines.append([Path(row["run"]).name, state, *("" if (v := row.get(n)) is None else str(v) for n in names)])
    print_columns(lines)


@app.command()
def settings(
    task: TaskOption = "create",
    algorithm: Annotated[str, typer.Option("--algorithm", "--algo")] = "sac",
    as_json: JsonOption = False,
) -> None:
    """List every setting with its default, type, bounds and meaning."""
    from ..runtime.modes import describe_settings

    rows = describe_settings(task, algorithm)
    if as_json:
        print_json({"settings": [{"name": n, "default": d, "description": t} for n, d, t in rows]})
        return
    for name, default, text in rows:
        print(f"{name} = {default!r}\n    {text}")
