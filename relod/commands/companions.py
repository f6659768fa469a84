"""`relod bench` but for `latency`: parts of relod, each beside something to compare it with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption, SeedOption, SetOption, TaskOption
from .output import end, print_json

if TYPE_CHECKING:
    from ..bench.form import Findings

__all__ = ["app"]

app = typer.Typer()

ShortOption = Annotated[bool, typer.Option("--short", help="Take seconds instead of minutes.")]
OutOption = Annotated[
    Path | None, typer.Option(help="Write the JSON document there, samples included.", metavar="FILE")
]
RoundsOption = Annotated[int | None, typer.Option(help="How often everything has its turn.", show_default=False)]


def _report(measure: Callable[[], Findings], as_json: bool, out: Path | None) -> None:
    """Measure, and tell: a table on stderr, the document on stdout and in a file if asked to."""
    from ..bench.children import terminable
    from ..bench.form import check_writable, show, write_document

    check_writable(out)
    with terminable():
        document = measure().document(sys.argv[1:])
    show(document)
    if out is not None:
        write_document(out, document)
    if as_json:
        print_json(document)


def _rounds(benchmark: Any, given: int | None, short: bool) -> int:
    """How many rounds to make of a module of `bench`."""
    from ..bench.form import size_of

    usual, shortest = benchmark.ROUNDS, benchmark.SHORT_ROUNDS
    return int(size_of("--rounds", given, short=short, shortest=shortest, usual=usual))


@app.command("transport")
def bench_transport(
    rounds: RoundsOption = None,
    exchanges: Annotated[int, typer.Option(help="Exchanges of each way in a round.")] = 200,
    pause_ms: Annotated[float, typer.Option(help="Time between two exchanges.")] = 0.0,
    short: ShortOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """A round trip over relod's link, beside bare websockets, TCP, pickle over TCP and ZeroMQ."""
    from ..bench import transport

    request = transport.TransportRequest(
        rounds=_rounds(transport, rounds, short), exchanges=exchanges, pause_ms=pause_ms
    )
    _report(lambda: transport.measure_transport(request), as_json, out)


@app.command("replay")
def bench_replay(
    rounds: RoundsOption = None,
    steps: Annotated[int, typer.Option(help="Steps in the replay; the default is 0.7 GB.")] = 8000,
    short: ShortOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """A minibatch out of the shared replay, beside a pickling queue and memcpy; rates; bytes per step."""
    from ..bench import replay

    request = replay.ReplayRequest(rounds=_rounds(replay, rounds, short), steps=steps)
    _report(lambda: replay.measure_replay(request), as_json, out)


@app.command("update")
def bench_update(
    rounds: RoundsOption = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Minibatch; may be given several times. Default: 64 and 256.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of torch, for both versions.")] = 2,
    short: ShortOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """An update of SAC, beside the straightforward version with equal losses."""
    from ..bench import update

    request = update.UpdateRequest(
        rounds=_rounds(update, rounds, short),
        device=device,
        batch_sizes=tuple(batch_size or (64, 256)),
        threads=threads,
    )
    _report(lambda: update.measure_update(request), as_json, out)


@app.command("control")
def bench_control(
    seconds: Annotated[
        float | None,
        typer.Option(help="Experience in each of two runs; starting, resets and ending come on top."),
    ] = None,
    task: TaskOption = "create",
    seed: SeedOption = 0,
    assignments: SetOption = None,
    short: ShortOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """How late the control loop is, idle and with the update worker at full load, beside a sentinel."""
    from ..bench import control
    from ..bench.form import size_of

    size = size_of("--seconds", seconds, short=short, shortest=control.SHORT_SECONDS, usual=control.SECONDS)
    request = control.ControlRequest(seconds=size, task=task, seed=seed, assignments=tuple(assignments or ()))
    _report(lambda: control.measure_control(request), as_json, out)


@app.command("link")
def bench_link(
    rounds: Annotated[int | None, typer.Option(help="A reset and a silence each.", show_default=False)] = None,
    seed: SeedOption = 0,
    short: ShortOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cuts of the link to a learner: time to notice, to be back, and to deliver what has piled up."""
    from ..bench import link

    request = link.LinkRequest(rounds=_rounds(link, rounds, short), seed=seed)
    _report(lambda: link.measure_link(request), as_json, out)


@app.command("all")
def bench_all(
    short: ShortOption = False,
    tables: Annotated[
        Path | None, typer.Option(help="Rewrite the tables between this page's markers.", metavar="FILE")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write each document there, as NAME.json.", metavar="FOLDER")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every benchmark of `relod bench` in turn."""
    from ..bench.children import terminable
    from ..bench.everything import AllRequest, run_all

    request = AllRequest(short=short, tables=tables, folder=out)
    with terminable():
        document, code = run_all(request)
    if as_json:
        print_json(document)
    end(code)
