"""What stands in for hardware, or beside it: simulated robots, the target page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .options import (
    ConfigOption,
    ControlOption,
    MjpegOption,
    SeedOption,
    SetOption,
    WorldOption,
)
from .output import end

__all__ = ["app"]

app = typer.Typer()
emulate = typer.Typer(help="A simulated robot behind its real wire protocol, for any client.", no_args_is_help=True)
app.add_typer(emulate, name="emulate")


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
    from ..runtime.modes import run_emulator

    code = run_emulator(
        task=task,
        world=world,
        seed=seed,
        config=config,
        environment=dict(os.environ),
        assignments=tuple(assignments or ()),
        options=options,
    )
    end(code)


@app.command()
def target(
    listen: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 means every one of this host.", metavar="HOST:PORT")
    ] = "0.0.0.0:8770",
) -> None:
    """Serve the page that shows the UR5's target: open it in the monitor's browser, full screen. Ctrl-C ends it."""
    from ..runtime.modes import run_target

    run_target(listen)
