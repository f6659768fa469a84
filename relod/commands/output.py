"""What commands print, and how they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from ..errors import StartError

__all__ = ["end", "end_run", "given", "print_columns", "print_json", "print_rows", "print_table", "show_timing"]


def end(code: int) -> NoReturn:
    raise typer.Exit(code)


def end_run(result: Any, as_json: bool) -> NoReturn:
    """Say how a run ended; `result` is a `host.Result`."""
    if as_json:
        print_json(result.summary)
    if result.error is not None:
        print(f"relod: {result.error}", file=sys.stderr)
    end(result.exit_code)


def show_timing(result: Any) -> None:
    """Where a run's time went, on stderr, and as `timing` in its document; nothing for a run that has no cycle."""
    from ..bench.report import RunTiming, format_runs

    if "run_dir" not in result.summary:
        return
    try:
        run = RunTiming.read(Path(result.summary["run_dir"]))
    except StartError:
        return
    result.summary["timing"] = run.to_dict()
    print(format_runs([run]), file=sys.stderr)


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those settings for which an option was given."""
    return {name: value for name, value in values.items() if value is not None}


def print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, default=str))


def print_table(document: dict[str, Any]) -> None:
    """A line for each value; lists of sentences get one for each of theirs."""
    width = max(16, *(len(name) + 2 for name in document))
    for name, value in document.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines or ["none"]:
            print(f"{name:{width}}{line}")


def print_rows(name: str, rows: list[dict[str, Any]], line: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    if as_json:
        print_json({name: rows})
        return
    width = max(len(row["name"]) for row in rows) + 2
    for row in rows:
        told = f"cannot be used: {row['error']}" if row["error"] else line(row)
        print(f"{row['name']:{width}}{told}\n{'':{width}}{row['target']}")


def print_columns(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
