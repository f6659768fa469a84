"""The `relod` command: its parts put together, and how an error becomes one line and an exit code."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from . import __version__
from .commands import benchmarks, emulators, looking, runs
from .errors import EXIT_OK, EXIT_SETTINGS, EXIT_SIGINT, RelodError

__all__ = ["run"]

app = typer.Typer(
    name="relod",
    help="Real-time reinforcement learning on physical robots from camera images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (runs, looking, emulators, benchmarks):
    app.add_typer(part.app)


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code (see `relod.errors`)."""
    arguments = _spelled_out(arguments)
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


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """`--profile` without a name asks where the time goes; with one, it names settings."""
    pairs = itertools.pairwise([*arguments, "--"])
    return ["--timing" if one == "--profile" and next_.startswith("-") else one for one, next_ in pairs]


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
