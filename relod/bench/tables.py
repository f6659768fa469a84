"""Tables of a Markdown page that a benchmark rewrites: what lies between its two markers, and nothing else.

<!-- bench:transport -->
...
<!-- /bench:transport -->
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import SettingsError
from ..runtime.timing import PERCENTS, STAGES
from .form import number, ratio_text

__all__ = ["TABLES", "check_markers", "replace_section", "section"]


def form_table(document: Mapping[str, Any]) -> str:
    """The table of a document of `form.Findings`: a row for each series."""
    names = list(PERCENTS)
    bases = {found["to"] for found in document["ratios"].values()}
    lines = [f"| series | {' | '.join(names)} | ratio (p10–p90) |", "|---" * (len(names) + 2) + "|"]
    for name, found in document["percentiles"].items():
        unit, told = document["samples"][name]["unit"], document["ratios"].get(name)
        shown = f"{ratio_text(told)} to {told['to']}" if told else "1" if name in bases else ""
        lines.append(f"| {name}, {unit} | {' | '.join(number(found[each]) for each in names)} | {shown} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in document["notes"])]).rstrip()


def latency_table(document: Mapping[str, Any]) -> str:
    """The table of `relod bench latency`: a row for each stage that a mode has, a column for each mode."""
    modes: Mapping[str, Any] = document["modes"]
    rows = {
        info.title.strip(): [_pair(found["stages"].get(info.name)) for found in modes.values()] for info in STAGES
    } | {
        "policy's lag, updates": [_pair(found["policy_lag"]) for found in modes.values()],
        "overruns, not shared by the sentinel": [_text(found["overruns_not_shared"]) for found in modes.values()],
        "late actions": [_text(found["late_actions"]) for found in modes.values()],
        "share of the cycle that is left": [_text(found["cycle_left"]) for found in modes.values()],
        "updates per second": [_text(found["updates_per_s"]) for found in modes.values()],
        "up, down, MB/s": [
            ", ".join(_text(found[f"{way}link_bytes_per_s"], 1e6) for way in ("up", "down")).strip(", ")
            for found in modes.values()
        ],
    }
    lines = [f"| ms, p50 / p99 | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items() if any(cells)]
    return "\n".join([*lines, "", str(document["advice"])])


def _pair(found: Mapping[str, float] | None) -> str:
    return f"{number(found['p50'])} / {number(found['p99'])}" if found else ""


def _text(value: float | None, unit: float = 1) -> str:
    return "" if value is None else number(value / unit)


# What makes a table of a document, by benchmark. One that is not here is measured, and has no table.
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = dict.fromkeys(
    ("transport", "replay", "update", "control", "link"), form_table
) | {"latency": latency_table}


def section(document: Mapping[str, Any]) -> str:
    """What stands between a benchmark's markers: its command, the machine and the date, and its table."""
    packages = document["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "numpy") if name in packages)
    machine = f"{document['cores']} cores of {document['cpu']}, Python {document['python']}, {versions}"
    load = f", load {document['load'][0]:g} at the end" if "load" in document else ""
    commit = f", commit {str(document['commit'])[:9]}" if document["commit"] else ""
    command = " ".join(str(word) for word in document["argv"])
    made = f"`{command}`, {str(document['date'])[:10]}{commit}. {machine}{load}."
    return f"{made}\n\n{TABLES[document['benchmark']](document)}"


def replace_section(text: str, name: str, body: str) -> str:
    """The page with `body` between the markers of `name`; `SettingsError` when it does not have them once each."""
    begin, end = _markers(name)
    check_markers(text, [name])
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{body}\n{end}{tail}"


def check_markers(text: str, names: Iterable[str]) -> None:
    """`SettingsError` when the page lacks a marker, or has it twice, or the end before the beginning."""
    for name in names:
        begin, end = _markers(name)
        for marker in (begin, end):
            if (count := text.count(marker)) != 1:
                raise SettingsError(
                    f"the page for the tables has {marker!r} {count} times",
                    f"put {begin} and {end} where the table goes",
                )
        if text.index(begin) > text.index(end):
            raise SettingsError(f"the page for the tables has {end!r} before {begin!r}", "swap them")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
