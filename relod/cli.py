"""The `relod` command: parse, call, print, exit code. What it calls is imported only then, so `--help` is quick."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import EXIT_BUG, EXIT_OK, EXIT_SETTINGS, EXIT_SIGINT, RelodError, StartError

__all__ = ["run"]

app = typer.Typer(
    name="relod",
    help="Real-time reinforcement learning on physical robots from camera images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
emulate = typer.Typer(help="A simulated robot behind its real wire protocol, for any client.", no_args_is_help=True)
app.add_typer(emulate, name="emulate")
log = typer.Typer(help="The experience log of a run: sum it up, check it, export it.", no_args_is_help=True)
app.add_typer(log, name="log")
bench = typer.Typer(help="Measure this machine, as a user would use it.", no_args_is_help=True)
app.add_typer(bench, name="bench")

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
    typer.Option("--algorithm", "--algo", help="How to learn: a name, or module:attribute. Default: sac."),
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
RunSeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of every random stream.")]
LogArgument = Annotated[Path, typer.Argument(help="Folder of a run, for example runs/latest.")]
TokenOption = Annotated[
    Path | None,
    typer.Option(help="File with the token that robot and learner share; or set RELOD_TOKEN.", metavar="FILE"),
]
MixedOption = Annotated[
    bool, typer.Option("--allow-mixed", help="Allow a real robot with a simulated camera, or the other way round.")
]


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code (see `relod.errors`)."""
    debug = "--debug" in arguments
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, stream=sys.stderr)
    try:
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="relod", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except typer.TyperException as error:  # a wrong option or command
        text = error.format_message()
        print(text if "\n" in text else f"relod: {text} `relod --help` tells more", file=sys.stderr)
        return EXIT_SETTINGS
    except typer.Abort:
        return EXIT_SIGINT
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except RelodError as error:
        if debug:
            raise
        print(f"relod: {error}", file=sys.stderr)
        return error.exit_code
    except BaseExceptionGroup as group:
        if debug:
            raise
        return _unwrap(group)


def _unwrap(group: BaseExceptionGroup) -> int:
    """The one error a user should see of several that ended tasks together: the first of our own, else a bug."""
    found, other = group.split(RelodError)
    if found is None or other is not None:
        raise group
    first: BaseException = found
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, RelodError)
    print(f"relod: {first}", file=sys.stderr)
    return first.exit_code


def _end(code: int) -> NoReturn:
    raise typer.Exit(code)


def _end_run(result: Any, as_json: bool) -> NoReturn:
    """Say how a run ended; `result` is a `host.Result`."""
    if as_json:
        _print_json(result.summary)
    if result.error is not None:
        print(f"relod: {result.error}", file=sys.stderr)
    _end(result.exit_code)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Those settings for which an option was given."""
    return {name: value for name, value in values.items() if value is not None}


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, default=str))


def _print_table(document: dict[str, Any]) -> None:
    """A line for each value; lists of sentences get one for each of theirs."""
    width = max(16, *(len(name) + 2 for name in document))
    for name, value in document.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines or ["none"]:
            print(f"{name:{width}}{line}")


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Tracebacks and debug messages; anywhere on the line.")
    ] = False,
) -> None:
    if version:
        print(f"relod {__version__}")
        raise typer.Exit


@app.command()
def robot(
    task: Annotated[
        str | None, typer.Option(help="What to learn: a name, or module:attribute. Default: create.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="Where the computation runs; see `relod modes`. Default: local-only.")
    ] = None,
    algorithm: AlgorithmOption = None,
    preset: PresetOption = None,
    profile: ProfileOption = None,
    robot: RobotOption = None,
    camera: CameraOption = None,
    allow_mixed: MixedOption = False,
    world: Annotated[
        str | None,
        typer.Option(help="Timing and noise of the simulated world: ideal, nominal or harsh. Default: nominal."),
    ] = None,
    clock: Annotated[
        str | None,
        typer.Option(help="wall: real time. virtual: as fast as the machine, deterministic. Default: wall."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run, in its folder and with its settings.", metavar="RUN")
    ] = None,
    learner: Annotated[
        str | None,
        typer.Option(help="Where the learner is, for the remote modes: ws://HOST:PORT or wss://.", metavar="URL"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="This robot's name among those of the learner; the host's if not given.")
    ] = None,
    token_file: TokenOption = None,
    ca: Annotated[Path | None, typer.Option("--ca", help="Certificate to trust, for wss://.", metavar="FILE")] = None,
    link: Annotated[
        str | None,
        typer.Option(help="Emulate the way to it: ethernet, wifi-good, wifi-busy or wifi-bad.", metavar="PROFILE"),
    ] = None,
    image_codec: Annotated[
        str | None, typer.Option(help="How camera images are kept and sent: raw or jpeg. Default: raw.")
    ] = None,
    policy_sync: Annotated[
        str | None, typer.Option(help="When a newer policy is applied: step or episode. Default: step.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="End after this many environment steps, counted from the run's beginning.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="End after this many minutes of experience.")] = None,
    seed: RunSeedOption = None,
    device: Annotated[str | None, typer.Option(help="Torch device of the learner, for example cpu or cuda:0.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep every input of the cycle, for `relod replay`.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drive a robot and learn. With no --robot the world is simulated behind the robot's real wire protocol."""
    from .runtime.modes import run_robot
    from .runtime.request import Request

    overrides = {
        "run.steps": steps,
        "run.minutes": minutes,
        "run.seed": seed,
        "run.record": True if record else None,
        "learner.device": device,
        "log.codec": image_codec,
        "link.policy_sync": policy_sync,
    }
    request = Request(
        task=task,
        mode=mode,
        algorithm=algorithm,
        preset=preset,
        profile=profile,
        robot=robot,
        camera=camera,
        allow_mixed=allow_mixed,
        world=world,
        clock=clock,
        resume=resume,
        learner=learner,
        name=name,
        token_file=token_file,
        ca=ca,
        link=link,
        config=config,
        environment=dict(os.environ),
        assignments=tuple(assignments or ()),
        overrides=_given(overrides),
        arguments=tuple(sys.argv[1:]),
    )
    result = run_robot(request)
    _end_run(result, as_json)


@app.command()
def learner(
    listen: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 means every one of this host.", metavar="HOST:PORT")
    ] = "0.0.0.0:8765",
    algorithm: AlgorithmOption = None,
    preset: PresetOption = None,
    profile: ProfileOption = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this learner's run, in its folder.", metavar="RUN")
    ] = None,
    token_file: TokenOption = None,
    cert: Annotated[Path | None, typer.Option(help="Certificate for wss://, with --key.", metavar="FILE")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key.", metavar="FILE")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="End after this many environment steps of all robots together.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="End after this many minutes of experience of all robots together.")
    ] = None,
    seed: RunSeedOption = None,
    device: Annotated[str | None, typer.Option(help="Torch device, for example cpu or cuda:0.")] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learn for robots in the modes remote-local and remote-only, any number of them, on this or other hosts."""
    from .runtime.remote.learnersession import LearnerRequest, run_learner

    overrides = {"run.steps": steps, "run.minutes": minutes, "run.seed": seed, "learner.device": device}
    result = run_learner(
        LearnerRequest(
            listen=listen,
            algorithm=algorithm,
            preset=preset,
            profile=profile,
            resume=resume,
            token_file=token_file,
            cert=cert,
            key=key,
            config=config,
            environment=dict(os.environ),
            assignments=tuple(assignments or ()),
            overrides=_given(overrides),
            arguments=tuple(sys.argv[1:]),
        )
    )
    _end_run(result, as_json)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, for example runs/latest.", metavar="RUN")],
    episodes: Annotated[int, typer.Option(min=1, help="Whole episodes to see.")] = 10,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="With the policy's own noise, as it learned; without it otherwise.")
    ] = False,
    task: Annotated[str | None, typer.Option(help="The task, for the run of a learner elsewhere.")] = None,
    robot: RobotOption = None,
    camera: CameraOption = None,
    allow_mixed: MixedOption = False,
    world: Annotated[str | None, typer.Option(help="ideal, nominal or harsh; the run's if not given.")] = None,
    clock: Annotated[
        str | None, typer.Option(help="virtual or wall. Default: virtual, and wall for a real robot.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of another simulated world than the one that was learned in.")
    ] = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a run's newest policy act: mean return with its confidence, a video and a picture of each episode."""
    from .runtime.evaluation import EvalRequest
    from .runtime.evaluation import evaluate as run_evaluation

    result = run_evaluation(
        EvalRequest(
            run=run,
            episodes=episodes,
            stochastic=stochastic,
            task=task,
            robot=robot,
            camera=camera,
            allow_mixed=allow_mixed,
            world=world,
            clock=clock,
            seed=seed,
            environment=dict(os.environ),
            assignments=tuple(assignments or ()),
            arguments=tuple(sys.argv[1:]),
        )
    )
    if not as_json and result.summary.get("mean_return") is not None:
        names = ("episodes", "successes", "mean_return", "mean_return_low", "mean_return_high", "run_dir")
        _print_table({name: result.summary[name] for name in names})
    _end_run(result, as_json)


@app.command()
def audit(
    robot_run: Annotated[Path, typer.Argument(help="The robot's run folder.")],
    learner_run: Annotated[Path, typer.Argument(help="The learner's run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Compare what a robot sent with what its learner has: nothing missing, doubled, out of order or different."""
    from .runtime.remote.audit import audit as compare

    report = compare(robot_run, learner_run)
    if as_json:
        _print_json(report.to_dict())
    else:
        print("\n".join(report.lines()))
    _end(report.exit_code)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="Run folder of a run made with --record.")],
    as_json: JsonOption = False,
) -> None:
    """Feed a recorded run through the cycle again and compare every command and transition."""
    from .runtime.playback import replay_run

    report = replay_run(folder)
    if as_json:
        _print_json(report.to_dict())
    print(report, file=sys.stderr)
    _end(EXIT_OK if report.identical else EXIT_BUG)


@app.command()
def check(
    robot: Annotated[str, typer.Option(help="Address of the robot, for example /dev/ttyUSB0.", metavar="ADDRESS")],
    camera: CameraOption = None,
    task: TaskOption = "create",
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask before it moves: wheels off the floor, room around an arm.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Commission a robot that is free to move: sensors, camera, motions, and how fast it stops."""
    from .runtime.modes import run_check

    document, code = run_check(
        task=task,
        robot=robot,
        camera=camera,
        yes=yes,
        config=config,
        environment=dict(os.environ),
        assignments=tuple(assignments or ()),
        confirm=lambda text: typer.confirm(text, err=True),
    )
    if as_json:
        _print_json(document)
    _end(code)


@emulate.command("create")
def emulate_create(
    link: Annotated[Path | None, typer.Option(help="Make this symbolic link to the port.")] = None,
    control: ControlOption = None,
    mjpeg_port: MjpegOption = 0,
    wheel_log: Annotated[
        Path | None, typer.Option(help="Write what the wheels did, with stamps, as JSON lines at the end.")
    ] = None,
    world: WorldOption = "nominal",
    seed: SeedOption = 0,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """A simulated Create 2 on a pseudo-terminal, with its camera; prints the port. Ctrl-C ends it."""
    options = {"link": link, "control": control, "mjpeg_port": mjpeg_port, "wheel_log": wheel_log}
    _emulate("create", world, seed, config, assignments, options)


@emulate.command("track")
def emulate_track(
    link: Annotated[Path | None, typer.Option(help="The rig's socket; in a temporary folder if not given.")] = None,
    mjpeg_port: MjpegOption = 0,
    world: WorldOption = "nominal",
    seed: SeedOption = 0,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """A simulated miniature rig on a unix socket, with its camera; prints the socket. Ctrl-C ends it."""
    _emulate("track", world, seed, config, assignments, {"link": link, "mjpeg_port": mjpeg_port})


@emulate.command("ur5")
def emulate_ur5(
    host: Annotated[
        str | None,
        typer.Option(help="Loopback address of the controller, 127.0.0.x; the first free one if not given."),
    ] = None,
    control: ControlOption = None,
    mjpeg_port: MjpegOption = 0,
    motion_log: Annotated[
        Path | None, typer.Option(help="Write what the arm did, with stamps, as JSON lines at the end.")
    ] = None,
    world: WorldOption = "nominal",
    seed: SeedOption = 0,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """A simulated UR5 (CB3): its controller's ports 29999 and 30001 to 30004, the target page's, and its camera.

    Prints the address. Ctrl-C ends it.
    """
    options = {"host": host, "control": control, "mjpeg_port": mjpeg_port, "wheel_log": motion_log}
    _emulate("ur5", world, seed, config, assignments, options)


def _emulate(
    task: str, world: str, seed: int, config: Path | None, assignments: list[str] | None, options: dict[str, Any]
) -> NoReturn:
    from .runtime.modes import run_emulator

    code = run_emulator(
        task=task,
        world=world,
        seed=seed,
        config=config,
        environment=dict(os.environ),
        assignments=tuple(assignments or ()),
        options=options,
    )
    _end(code)


@app.command()
def target(
    listen: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 means every one of this host.", metavar="HOST:PORT")
    ] = "0.0.0.0:8770",
) -> None:
    """Serve the page that shows the UR5's target: open it in the monitor's browser, full screen. Ctrl-C ends it."""
    from .runtime.modes import run_target

    run_target(listen)


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
    from .runtime import experiments
    from .runtime.plot import PlotOptions, parse_reference, write_picture

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
        _print_json({"groups": experiments.describe(groups)})


@log.command("info")
def log_info(run: LogArgument, as_json: JsonOption = False) -> None:
    """Sum up what is in the log."""
    from .runtime.log.check import describe_log

    document = describe_log(run)
    if as_json:
        _print_json(document)
        return
    _print_table(document)


@log.command("verify")
def log_verify(run: LogArgument, as_json: JsonOption = False) -> None:
    """Check every checksum, frame, step and episode; exit code 3 when something is wrong."""
    from .runtime.log.check import check_log

    document, faults = check_log(run)
    if as_json:
        _print_json(document)
    else:
        _print_table(document)
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
    from .runtime.log.export import export_log

    index = export_log(run, out, frames=frames, episodes=episodes)
    if as_json:
        _print_json(index)
    else:
        print(f"episodes: {len(index['episodes'])}, in {out} with index.json")


@app.command()
def modes(as_json: JsonOption = False) -> None:
    """Which process runs where in each mode."""
    from .runtime.modes import describe_modes

    table = describe_modes()
    if as_json:
        _print_json({"modes": table})
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
    from .runtime.listing import list_tasks

    def line(row: dict[str, Any]) -> str:
        images = "x".join(map(str, row["images"]))
        return f"{row['robot']}, every {row['cycle_ms']:g} ms, images {images}, {len(row['actions'])} actions"

    _print_rows("tasks", list_tasks(), line, as_json)


@app.command()
def algos(as_json: JsonOption = False) -> None:
    """The algorithms that are installed: relod's own, and those of other packages."""
    from .runtime.listing import list_algorithms

    _print_rows("algorithms", list_algorithms(), lambda row: f"presets {', '.join(row['presets'])}", as_json)


def _print_rows(name: str, rows: list[dict[str, Any]], line: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    if as_json:
        _print_json({name: rows})
        return
    width = max(len(row["name"]) for row in rows) + 2
    for row in rows:
        told = f"cannot be used: {row['error']}" if row["error"] else line(row)
        print(f"{row['name']:{width}}{told}\n{'':{width}}{row['target']}")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """The runs in a folder and their state: running, ended, or interrupted and able to go on."""
    from .runtime.listing import list_runs

    rows = list_runs(folder)
    if as_json:
        _print_json({"runs": rows})
        return
    lines = [["run", "state", "task", "mode", "preset", "episodes", "minutes", "mean of last 20"]]
    for row in rows:
        state = f"{row['state']}, exit code {row['exit_code']}" if row.get("exit_code") else row["state"]
        names = ("task", "mode", "preset", "episodes", "experience_minutes", "mean_return_of_last_20")
        lines.append([Path(row["run"]).name, state, *("" if (v := row.get(n)) is None else str(v) for n in names)])
    _print_columns(lines)


def _print_columns(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def settings(
    task: TaskOption = "create",
    algorithm: Annotated[str, typer.Option("--algorithm", "--algo")] = "sac",
    as_json: JsonOption = False,
) -> None:
    """List every setting with its default, type, bounds and meaning."""
    from .runtime.modes import describe_settings

    rows = describe_settings(task, algorithm)
    if as_json:
        _print_json({"settings": [{"name": n, "default": d, "description": t} for n, d, t in rows]})
        return
    for name, default, text in rows:
        print(f"{name} = {default!r}\n    {text}")


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
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the modes in turn for real, simulated robot included, and show what each does to the cycle."""
    from .runtime.benchlatency import LatencyRequest, run_latency

    request = LatencyRequest(
        task=task,
        modes=tuple(modes.split(",")),
        link=link,
        seconds=seconds,
        seed=seed,
        learner=learner,
        token_file=token_file,
        assignments=tuple(assignments or ()),
    )
    document, code = run_latency(request, sys.argv[1:])
    if as_json:
        _print_json(document)
    _end(code)
