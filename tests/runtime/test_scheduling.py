"""Real-time scheduling: what is permitted, as a pure function; what the kernel makes of it, where it lets us."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from multiprocessing.connection import Connection

import pytest

from relod.errors import EXIT_START, StartError
from relod.runtime import scheduling
from relod.runtime.scheduling import PRIORITIES, Permitted, check_permitted, described, enter, raise_to, refusal

ALL = Permitted(priority=99, memory_bytes=None)
MIB = 1 << 20


def permitted_here() -> bool:
    return not refusal(Permitted.here())


needs_permission = pytest.mark.skipif(not permitted_here(), reason="real-time scheduling is not permitted here")


def test_who_stops_the_robot_comes_before_who_moves_it():
    assert PRIORITIES["guard"] > PRIORITIES["device"] > PRIORITIES["control"] == PRIORITIES["sentinel"] > 0
    assert max(PRIORITIES.values()) < 50, "the kernel's interrupt threads come first"


@pytest.mark.parametrize(
    ("permitted", "said"),
    [
        (ALL, []),
        (Permitted(priority=46, memory_bytes=None), []),
        (Permitted(priority=45, memory_bytes=None), ["priority 46 (limit: 45)"]),
        (Permitted(priority=0, memory_bytes=None), ["priority 46 (limit: 0)"]),
        (Permitted(priority=99, memory_bytes=8 * MIB), ["locked memory without limit (limit: 8 MiB)"]),
        (Permitted(priority=99, memory_bytes=0), ["locked memory without limit (limit: 0 MiB)"]),
        (Permitted(priority=0, memory_bytes=64 * 1024), ["(limit: 0) and locked", "(limit: 0.0625 MiB)"]),
        (Permitted(priority=99, memory_bytes=None, refused="not permitted"), ["whatever the limits say (not perm"]),
    ],
)
def test_what_is_not_permitted_is_said(permitted, said):
    told = refusal(permitted)
    assert bool(told) == bool(said)
    for text in said:
        assert text in told


def test_a_refusal_is_one_line_with_the_command_that_permits_it(monkeypatch):
    monkeypatch.setattr(Permitted, "here", classmethod(lambda cls: cls(priority=0, memory_bytes=8 * MIB)))
    with pytest.raises(StartError) as caught:
        check_permitted()
    assert caught.value.exit_code == EXIT_START
    told = str(caught.value)
    assert "\n" not in told
    assert "real-time priority 46 (limit: 0)" in told
    assert "sudo prlimit --pid $$ --rtprio=46 --memlock=unlimited" in told


@pytest.mark.parametrize("capabilities", [0, 1 << scheduling._CAP_SYS_NICE, 1 << scheduling._CAP_IPC_LOCK])
def test_limits_and_capabilities_count(monkeypatch, capabilities):
    limits = {resource.RLIMIT_RTPRIO: (0, 7), resource.RLIMIT_MEMLOCK: (4096, 8192)}
    monkeypatch.setattr(scheduling, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(scheduling, "_try_policy", lambda priority: "")
    monkeypatch.setattr(scheduling.resource, "getrlimit", limits.__getitem__)
    found = Permitted.here()
    assert found.priority == (99 if capabilities >> scheduling._CAP_SYS_NICE & 1 else 7)
    assert found.memory_bytes == (None if capabilities >> scheduling._CAP_IPC_LOCK & 1 else 8192)


def test_the_trial_leaves_this_process_as_it_was():
    before = os.sched_getscheduler(0)
    Permitted.here()
    assert os.sched_getscheduler(0) == before


# -- in processes of their own -----------------------------------------------------------------------------------------


def _enter_and_wait(role: str, wire: Connection) -> None:
    try:
        enter(role)
    except StartError as error:
        wire.send(str(error))
        return
    wire.send(os.sched_getscheduler(0))
    wire.recv()


def _spin_as_control(_: Connection) -> None:
    enter("control", runaway_s=0.05)
    while True:
        pass


def _without_rights(wire: Connection) -> None:
    os.setresuid(65534, 65534, 65534)
    resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
    wire.send(refusal(Permitted.here()))
    _enter_and_wait("control", wire)


def _start(target, *arguments):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


@needs_permission
@pytest.mark.parametrize("role", ["control", "device", "sentinel"])
def test_a_process_has_the_priority_of_its_role_and_its_memory_is_locked(role):
    process, wire = _start(_enter_and_wait, role)
    flags = wire.recv()
    assert process.pid is not None
    assert bool(flags & os.SCHED_RESET_ON_FORK) == (role != "device"), "what the device process starts is on the path"
    expected = {"policy": "SCHED_FIFO", "priority": PRIORITIES[role], "memory_locked": True}
    assert described({role: process.pid, "gone": 2**22 - 1}) == {role: expected}
    raise_to("guard", process.pid)
    assert described({role: process.pid})[role]["priority"] == PRIORITIES["guard"]
    wire.send("enough")
    process.join(5)


def test_a_process_that_has_ended_is_not_described():
    zombie = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    try:
        assert described({"control": zombie}) == {}
    finally:
        os.waitpid(zombie, 0)


@needs_permission
def test_an_endless_loop_is_ended_by_the_kernel():
    process, _wire = _start(_spin_as_control)
    process.join(10)
    assert process.exitcode == -signal.SIGXCPU


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody with fewer rights")
def test_who_has_no_right_is_told_so_before_and_when_trying():
    process, wire = _start(_without_rights)
    assert "real-time priority 46 (limit: 0)" in wire.recv()
    assert "--realtime is not permitted here: control process: " in wire.recv()
    process.join(5)
