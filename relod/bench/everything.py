"""`relod bench all`: every benchmark in turn, each as a command of its own, and the tables of a page made of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import EXIT_OK, EXIT_START, SettingsError
from ..runtime.clock import utc_seconds
from .children import Ended, run_relod
from .form import write_document
from .tables import TABLES, check_markers, replace_section, section

__all__ = ["BENCHMARKS", "AllRequest", "run_all"]

# The options that make each short.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "latency": ("--seconds", "10"),
    "transport": ("--short",),
    "replay": ("--short",),
    "update": ("--short",),
    "control": ("--short",),
    "link": ("--short",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AllRequest:
    """What to do with what the benchmarks find; raises `SettingsError` when that cannot be done."""

    short: bool = False
    tables: Path | None = None  # a page with markers, see `tables`
    folder: Path | None = None  # for the documents, NAME.json each

    def __post_init__(self) -> None:
        if self.tables is not None:
            check_markers(_read(self.tables), TABLES)
            _write(self.tables, _read(self.tables))
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe = self.folder / ".probe"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise SettingsError(f"--out {self.folder}: {error.strerror}", "name a folder for files") from error


def run_all(
    request: AllRequest, run: Callable[[Sequence[str]], Ended] = lambda arguments: run_relod(arguments, shown=True)
) -> tuple[dict[str, Any], int]:
    """Run them; returns their documents and the exit code, which is that of the first that failed.

    One that fails leaves the others, and its own table, as they are. Whatever ends is written at once.
    """
    documents: dict[str, Any] = {}
    code = EXIT_OK
    for name, short in BENCHMARKS.items():
        ended = run(["bench", name, "--json", *(short if request.short else ())])
        if ended.document is None or not ended.good:
            print(f"relod: bench {name} failed with exit code {ended.exit_code}", file=sys.stderr)
            code = code or ended.exit_code or EXIT_START
            continue
        document = {"date": datetime.fromtimestamp(utc_seconds(), UTC).isoformat(timespec="seconds")} | ended.document
        documents[name] = document
        if request.folder is not None:
            write_document(request.folder / f"{name}.json", document)
        if request.tables is not None and name in TABLES:
            _write(request.tables, replace_section(_read(request.tables), name, section(document)))
    return {"benchmark": "all", "short": request.short, "documents": documents}, code


def _read(page: Path) -> str:
    try:
        return page.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsError(f"--tables {page}: {why}", "name a Markdown file that can be read") from error


def _write(page: Path, text: str) -> None:
    try:
        page.write_text(text, "utf-8")
    except OSError as error:
        raise SettingsError(f"--tables {page}: {error.strerror}", "name a file that can be written") from error
