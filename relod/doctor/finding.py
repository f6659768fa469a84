"""What a check says, and the machine it looks at."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RelodError

__all__ = ["Finding", "Machine", "State", "absent", "guarded", "note", "ok", "percentiles_ms", "wrong"]


class State(enum.StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # relod runs; it could run better, or a part of it is missing
    WRONG = "wrong"  # something relod does would fail here
    ABSENT = "not here"  # nothing to check


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str  # of the check, always the same
    subject: str = ""  # device, host or package, where a check has several
    state: State
    found: str
    mend: str = ""  # the one command or step
    values: dict[str, Any] = field(default_factory=dict)  # what `found` says, as plain values

    @property
    def title(self) -> str:
        """What the line is about."""
        return f"{self.name} {self.subject}".rstrip()


def ok(name: str, found: str, subject: str = "", **values: Any) -> Finding:
    return Finding(name=name, subject=subject, state=State.OK, found=found, values=values)


def note(name: str, found: str, mend: str = "", subject: str = "", **values: Any) -> Finding:
    return Finding(name=name, subject=subject, state=State.NOTE, found=found, mend=mend, values=values)


def wrong(name: str, found: str, mend: str, subject: str = "", **values: Any) -> Finding:
    return Finding(name=name, subject=subject, state=State.WRONG, found=found, mend=mend, values=values)


def absent(name: str, found: str, subject: str = "", mend: str = "", **values: Any) -> Finding:
    return Finding(name=name, subject=subject, state=State.ABSENT, found=found, mend=mend, values=values)


def _may_use(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine as files, and who asks. Tests give a folder with the files of another machine."""

    root: Path = Path("/")
    may_use: Callable[[Path], bool] = _may_use  # whether this user may read and write a device
    groups: frozenset[int] = frozenset((os.getegid(), *os.getgroups()))  # of this login
    uid: int = os.getuid()

    def path(self, name: str) -> Path:
        """Where a file of the machine is: `/proc/meminfo`, say."""
        return self.root / name.lstrip("/")

    def name_of(self, path: Path) -> str:
        """The other way round."""
        return f"/{path.relative_to(self.root)}"

    def text(self, name: str) -> str:
        """What is in a small file, without white space and NULs around it; empty when it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip("\0 \t\n")
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """The number in a file; None when there is none."""
        text = self.text(name)
        return int(text) if text.lstrip("-").isdecimal() else None

    def find(self, *patterns: str) -> list[Path]:
        """The files that fit one of these patterns, in natural order."""
        found = {path for pattern in patterns for path in self.root.glob(pattern.lstrip("/"))}
        return sorted(found, key=lambda path: (len(path.name), path.name))

    @property
    def jetson(self) -> str:
        """The board's name on an NVIDIA Jetson, else empty."""
        model = self.text("/proc/device-tree/model")
        tegra = self.path("/etc/nv_tegra_release").exists() or "jetson" in model.lower()
        return (model or "NVIDIA Jetson") if tegra else ""


def guarded(name: str, check: Callable[[], Finding | Sequence[Finding]], subject: str = "") -> Iterator[Finding]:
    """What a check finds; what keeps it from looking is a finding too."""
    try:
        found = check()
        yield from [found] if isinstance(found, Finding) else found
    except RelodError as error:
        yield wrong(name, error.message, error.hint or "check its address, and that it is switched on", subject)
    except ImportError as error:
        missing = error.name or str(error)
        yield wrong(
            name, f"not checked: {missing} cannot be imported ({error})", "mend what packages and OpenCV say", subject
        )
    except (OSError, ValueError) as error:
        yield note(name, f"could not be looked at: {error}", subject=subject)


def percentiles_ms(durations_ms: Sequence[float]) -> dict[str, float]:
    """`p50 p99 max` of some durations, by nearest rank; numpy may be what is missing."""
    ordered = sorted(durations_ms)
    ranks = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[max(0, -int(-share * len(ordered) // 1) - 1)], 3) for name, share in ranks.items()}
