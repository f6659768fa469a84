"""The form that the benchmarks of `relod bench` share: what is found, as a JSON document and as a table.

A benchmark gives `Findings`: raw samples by the name of their series, which is stable, and ratios to a series measured
beside them in the same run. Nothing here measures anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from ..errors import SettingsError
from ..runtime import provenance
from ..runtime.clock import utc_seconds
from ..runtime.timing import PERCENTS

__all__ = [
    "Findings",
    "Series",
    "check_writable",
    "number",
    "percentiles",
    "positive",
    "ratio",
    "ratio_text",
    "show",
    "size_of",
    "write_document",
]

SHOWN = ("p50", "p90", "p99", "max")  # in the table, which has 80 columns
DIGITS = 5  # decimals kept of a sample: 10 ns of a millisecond


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Raw samples, in the order in which they were taken."""

    values: Sequence[float]
    unit: str = "ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a benchmark found.

    Args:
        samples: by series; a series without values is left out of what is computed.
        ratios: of series to the one that their `to` names, as `ratio` makes them.
        facts: whatever else there is to say, as plain values; top-level keys of the document.
        notes: sentences for people, under the table.
    """

    benchmark: str
    parameters: Mapping[str, Any]
    samples: Mapping[str, Series]
    ratios: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def document(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The JSON document; `arguments` are those of the command."""
        return {
            "benchmark": self.benchmark,
            **provenance.describe(["relod", *arguments]),
            "date": datetime.fromtimestamp(utc_seconds(), UTC).isoformat(timespec="seconds"),
            "load": [round(each, 2) for each in os.getloadavg()],  # after it, and what it made of it included
            "parameters": dict(self.parameters),
            "percentiles": {name: percentiles(each.values) for name, each in self.samples.items() if each.values},
            "ratios": dict(self.ratios),
            **self.facts,
            "notes": list(self.notes),
            "samples": {
                name: {"unit": each.unit, "values": [round(float(value), DIGITS) for value in each.values]}
                for name, each in self.samples.items()
            },
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """`p50 p90 p99 p999 max` of at least one sample."""
    return {name: round(float(np.percentile(values, percent)), DIGITS) for name, percent in PERCENTS.items()}


def ratio(to: str, values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """What was measured in turns with `to`, over it, turn by turn: the median of the ratios and their spread.

    Each pair was taken within moments, so that what else the machine does meets both.
    """
    each = [value / other for value, other in zip(values, base, strict=True)]
    return {"to": to} | {
        name: round(float(np.percentile(each, percent)), 3)
        for name, percent in (("median", 50), ("p10", 10), ("p90", 90))
    }


# -- options -----------------------------------------------------------------------------------------------------------


def size_of(option: str, given: float | None, *, short: bool, shortest: float, usual: float) -> float:
    """The size of a benchmark: the option's value, else that of --short or the usual one; must be above 0."""
    return positive(option, given if given is not None else shortest if short else usual)


def positive(option: str, value: float) -> float:
    """The option's value; `SettingsError` when it is not a number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise SettingsError(f"{option} {value:g}", "give a number above 0")
    return value


def check_writable(path: Path | None, option: str = "--out") -> None:
    """Find out before anything is measured; `SettingsError` when no file can be written there."""
    if path is None:
        return
    existed = path.exists()
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise SettingsError(f"{option} {path}: {error.strerror}", "name a file that can be written") from error


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document; `SettingsError` when the path no longer takes one."""
    try:
        path.write_bytes(msgspec.json.encode(document) + b"\n")
    except OSError as error:
        raise SettingsError(f"--out {path}: {error.strerror}", "name a file that can be written") from error


# -- for people --------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """About three digits."""
    if value and abs(value) < 0.1:
        return f"{value:.2g}" if abs(value) >= 0.001 else f"{value:.1e}"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def ratio_text(found: Mapping[str, Any] | None) -> str:
    """`2.35 (2.19–2.40)`; empty for none."""
    return f"{number(found['median'])} ({number(found['p10'])}–{number(found['p90'])})" if found else ""


def show(document: Mapping[str, Any], console: Console | None = None) -> None:
    """The document as a table, on stderr if no other console is given."""
    console = console or Console(stderr=True)
    parameters = ", ".join(f"{name} {value}" for name, value in document["parameters"].items())
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("series")
    table.add_column("", no_wrap=True)
    for name in (*SHOWN, "ratio (p10–p90)"):
        table.add_column(name, justify="right", no_wrap=True)
    baselines = {found["to"] for found in document["ratios"].values()}
    for name, found in document["percentiles"].items():
        told = document["ratios"].get(name)
        ratio_cell = ratio_text(told) if told else "1" if name in baselines else ""
        unit = document["samples"][name]["unit"]
        table.add_row(name, unit, *(number(found[percent]) for percent in SHOWN), ratio_cell)
    console.print(f"{document['benchmark']}: {parameters}", markup=False, highlight=False)
    console.print(table, markup=False, highlight=False)
    for base in sorted(baselines):
        against = [name for name, found in document["ratios"].items() if found["to"] == base]
        what = f" of {', '.join(against)}" if len(baselines) > 1 else ""
        console.print(f"ratio{what}: to {base}", markup=False, highlight=False)
    for note in document["notes"]:
        console.print(note, markup=False, highlight=False)
