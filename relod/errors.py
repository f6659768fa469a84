"""Everything relod raises on purpose, and the exit code each kind ends with.

    RelodError                1  base; by itself a defect of relod
    ├── SettingsError         2  a wrong setting, name, value or combination
    ├── StartError            3  a device, port, file or learner that is needed to start
    ├── SafetyStop            4  the run was ended because going on was not safe
    │   └── PackageError      4  an algorithm, task, driver or world of another package failed in mid-run
    └── LinkLost              5  the learner stayed away past the deadline

130 and 143 are what a shell expects after SIGINT and SIGTERM.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_BUG = 1
EXIT_SETTINGS = 2
EXIT_START = 3
EXIT_SAFETY = 4
EXIT_LINK = 5
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class RelodError(Exception):
    """An error a user can act on: `message` says what happened and with which value, `hint` what to do."""

    exit_code: ClassVar[int] = EXIT_BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type[RelodError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class SettingsError(RelodError):
    """A setting, name, value or combination that cannot be used."""

    exit_code = EXIT_SETTINGS


class StartError(RelodError):
    """Something outside relod that is needed to start is missing, busy or silent."""

    exit_code = EXIT_START


class SafetyStop(RelodError):
    """The run was ended because going on was not safe; the message says whether the robot is known to stand."""

    exit_code = EXIT_SAFETY


class PackageError(SafetyStop):
    """Code of another package raised an error, or gave what its interface does not allow; the message names it."""


class LinkLost(RelodError):
    """The link to the learner stayed down past its deadline."""

    exit_code = EXIT_LINK


def error_with_code(exit_code: int, message: str, hint: str = "") -> RelodError:
    """The error of the tree that ends with `exit_code`; used where an error crosses a process boundary."""
    for kind in (SettingsError, StartError, SafetyStop, LinkLost):
        if kind.exit_code == exit_code:
            return kind(message, hint)
    return RelodError(message, hint)
