"""Two network namespaces with a cable between them, where the machine allows it without being root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LEARNER_ADDRESS, ROBOT_ADDRESS = "10.99.0.1", "10.99.0.2"


class Cable:
    """A veth pair; the learner's end is in one namespace, the robot's in the other."""

    def __init__(self) -> None:
        self._holders = [_hold("--user", "--map-root-user")]
        self._holders.append(_hold(prefix=self._enter(0)))
        near, far = self._enter(0), self._enter(1)
        _run(*near, "ip", "link", "add", "robot0", "type", "veth", "peer", "learner0", "netns", self._pid(1))
        for prefix, device, address in ((near, "robot0", ROBOT_ADDRESS), (far, "learner0", LEARNER_ADDRESS)):
            _run(*prefix, "ip", "address", "add", f"{address}/24", "dev", device)
            for name in (device, "lo"):
                _run(*prefix, "ip", "link", "set", name, "up")
        self.robot, self.learner = near, far  # put before a command, they run it there

    def set(self, state: str) -> None:
        """`down` loses every packet without a word, as a WiFi out of reach does; `up` mends it."""
        _run(*self._enter(1), "ip", "link", "set", "learner0", state)

    def close(self) -> None:
        for holder in reversed(self._holders):
            holder.kill()
            holder.wait()
            assert holder.stdout is not None
            holder.stdout.close()

    def _pid(self, number: int) -> str:
        return str(self._holders[number].pid)

    def _enter(self, number: int) -> list[str]:
        return ["nsenter", "--preserve-credentials", "--user", "--net", "--target", self._pid(number)]


def _hold(*options: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A process whose namespaces live as long as it does."""
    command = [*prefix, "unshare", *options, "--net", "sh", "-c", "echo ready; exec sleep 1000"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert holder.stdout is not None
    if holder.stdout.readline().strip() != "ready":
        holder.wait()
        raise PermissionError("no network namespaces for this user")
    return holder


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def cable() -> Iterator[Cable | None]:
    """The cable, or None where this machine has no such thing."""
    made: Cable | None = None
    if all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        try:
            made = Cable()
        except (OSError, subprocess.CalledProcessError):
            made = None
    try:
        yield made
    finally:
        if made is not None:
            made.close()
