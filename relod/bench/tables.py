"""Tables of a Markdown page that a benchmark rewrites: what lies between its two markers, and nothing else.

<!-- bench:transport -->
...
<!-- /bench:transport -->
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import SettingsError
from .form import PERCENTILES, number, ratio_text

__all__ = ["TABLES", "check_markers", "replace_section", "section"]


def form_table(document: Mapping[str, Any]) -> str:
    """The table of a document of `form.Findings`: a row for each series."""
    names = list(PERCENTILES)
    bases = {found["to"] for found in document["ratios"].values()}
    lines = [f"| series | {' | '.join(names)} | ratio (p10–p90) |", "|---" * (len(names) + 2) + "|"]
    for name, found in document["percentiles"].items():
        unit, told = document["samples"][name]["unit"], document["ratios"].get(name)
        shown = f"{ratio_text(told)} to {told['to']}" if told else "1" if name in bases else ""
        lines.append(f"| {name}, {unit} | {' | '.join(number(found[each]) for each in names)} | {shown} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in document["notes"])]).rstrip()


# What makes a table of a document, by benchmark. One that is not here is measured, and has no table.
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = dict.fromkeys(
    ("transport", "replay", "update", "control", "link"), form_table
)


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
