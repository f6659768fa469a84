"""Runs: robot, learner, what is tried before and what is seen after."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import EXIT_BUG, EXIT_OK, SettingsError
from .options import (
    AlgorithmOption,
    CameraOption,
    ConfigOption,
    JsonOption,
    MixedOption,
    PresetOption,
    ProfileOption,
    RobotOption,
    RunSeedOption,
    SetOption,
    TaskOption,
    TimingOption,
    TokenOption,
)
from .output import end, end_run, given, print_json, print_table, show_timing

__all__ = ["app"]

app = typer.Typer()


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
    timing: TimingOption = False,
    realtime: Annotated[
        bool | None,
        typer.Option(
            "--realtime/--no-realtime",
            help="Real-time priority and locked memory for the robot's processes; ends at once where not permitted.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drive a robot and learn. With no --robot the world is simulated behind the robot's real wire protocol."""
    from ..runtime.modes import run_robot
    from ..runtime.request import Request

    overrides = {
        "run.steps": steps,
        "run.minutes": minutes,
        "run.seed": seed,
        "run.record": True if record else None,
        "run.realtime": realtime,
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
        overrides=given(overrides),
        arguments=tuple(sys.argv[1:]),
    )
    if timing and clock == "virtual":
        raise SettingsError("--profile with --clock virtual: virtual time has no latency", "run in real time")
    result = run_robot(request)
    if timing:
        show_timing(result)
    end_run(result, as_json)


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
    from ..runtime.remote.learnersession import LearnerRequest, run_learner

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
            overrides=given(overrides),
            arguments=tuple(sys.argv[1:]),
        )
    )
    end_run(result, as_json)


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
    from ..runtime.evaluation import EvalRequest
    from ..runtime.evaluation import evaluate as run_evaluation

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
        print_table({name: result.summary[name] for name in names})
    end_run(result, as_json)


@app.command()
def audit(
    robot_run: Annotated[Path, typer.Argument(help="The robot's run folder.")],
    learner_run: Annotated[Path, typer.Argument(help="The learner's run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Compare what a robot sent with what its learner has: nothing missing, doubled, out of order or different."""
    from ..runtime.remote.audit import audit as compare

    report = compare(robot_run, learner_run)
    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(report.lines()))
    end(report.exit_code)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="Run folder of a run made with --record.")],
    as_json: JsonOption = False,
) -> None:
    """Feed a recorded run through the cycle again and compare every command and transition."""
    from ..runtime.playback import replay_run

    report = replay_run(folder)
    if as_json:
        print_json(report.to_dict())
    print(report, file=sys.stderr)
    end(EXIT_OK if report.identical else EXIT_BUG)


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
    from ..runtime.modes import run_check

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
        print_json(document)
    end(code)
