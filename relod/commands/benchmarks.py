"""Measuring this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SettingsError
from . import companions
from .options import (
    CameraOption,
    JsonOption,
    MixedOption,
    RobotOption,
    SeedOption,
    SetOption,
    TaskOption,
    TokenOption,
)
from .output import end, print_json

__all__ = ["app"]

app = typer.Typer()
bench = typer.Typer(help="Measure this machine, as a user would use it.", no_args_is_help=True)
app.add_typer(bench, name="bench")
bench.add_typer(companions.app)


@bench.command("latency")
def bench_latency(
    task: TaskOption = "create",
    modes: Annotated[
        str, typer.Option(help="Modes to run, in turn.", metavar="MODE,...")
    ] = "local-only,remote-local,remote-only",
    link: Annotated[
        str | None,
        typer.Option(help="Emulate the way to the learner; as for `relod robot`.", metavar="PROFILE"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of cycles in each mode; starting takes 10 to 20 more.")] = 20,
    seed: SeedOption = 0,
    learner: Annotated[
        str | None,
        typer.Option(help="A learner that runs already; if not given, one is started on this host.", metavar="URL"),
    ] = None,
    token_file: TokenOption = None,
    robot: RobotOption = None,
    camera: CameraOption = None,
    allow_mixed: MixedOption = False,
    assignments: SetOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it, as .svg or .png; needs relod[plots].", metavar="FILE")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document to a file.", metavar="FILE")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the modes in turn for real, simulated robot included: where the time goes, live, and which to use."""
    from ..bench.latency import LatencyRequest, run_latency

    request = LatencyRequest(
        task=task,
        modes=tuple(modes.split(",")),
        link=link,
        seconds=seconds,
        seed=seed,
        learner=learner,
        token_file=token_file,
        robot=robot,
        camera=camera,
        allow_mixed=allow_mixed,
        assignments=tuple(assignments or ()),
        plot=plot,
        out=out,
    )
    document, code = run_latency(request, sys.argv[1:])
    if as_json:
        print_json(document)
    end(code)


@bench.command("report")
def bench_report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, for example runs/latest.", metavar="RUN...")],
    trace: Annotated[
        Path | None, typer.Option(help="Write the spans of one run for ui.perfetto.dev.", metavar="FILE.json")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say where the time of runs went, stage by stage and side by side."""
    from ..bench.report import compare_runs, format_runs
    from ..bench.trace import write_trace

    if trace is not None and len(runs) != 1:
        raise SettingsError(f"--trace with {len(runs)} runs", "name one run")
    found = compare_runs(runs)
    if trace is not None:
        print(f"relod: {write_trace(found[0], trace)} spans in {trace}", file=sys.stderr)
    if as_json:
        print_json({"runs": [run.to_dict() for run in found]})
    else:
        print(format_runs(found))
