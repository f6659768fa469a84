"""What is at the other end of a network: a UR controller, a learner."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StartError
from ..runtime.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from .finding import Finding, guarded, note, ok, percentiles_ms, wrong

__all__ = ["check_learner", "check_ur5", "is_path"]

DASHBOARD, PACKETS, SCRIPTS, LEARNER = "UR5 dashboard", "UR5 packets", "UR5 scripts", "learner"

CONNECT_S = 1.0
LISTEN_S = 1.0
GOOD_RATE_HZ = 100.0  # of 125
CLOSED = "see the controller's settings, Security, for interfaces that are switched off, and firewalls in between"

HELLO_S = 5.0  # what a learner gives a stranger
PINGS, PING_EVERY_S = 50, 0.02
CYCLE_MS = 40.0  # the shortest of the tasks: in remote-only a later answer is too late


def is_path(address: str) -> bool:
    """Whether `--robot` names a device of this machine, not a host."""
    return "/" in address


# -- a UR controller ---------------------------------------------------------------------------------------------------


def check_ur5(host: str) -> list[Finding]:
    """Whether a UR controller answers at `host`: its dashboard, its packets, its script ports. Commands nothing."""
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        mend = "check --robot, or give the controller's IP address; a serial port begins with /dev/"
        return [wrong(DASHBOARD, f"there is no host {host!r} in this network ({reason})", mend, host)]
    return [
        *guarded(DASHBOARD, lambda: asyncio.run(_check_dashboard(host, address)), host),
        *guarded(PACKETS, lambda: _check_packets(host, address), host),
        *guarded(SCRIPTS, lambda: _check_script_ports(host, address), host),
    ]


async def _check_dashboard(host: str, address: str) -> Finding:
    from ..robots.ur5.pendant import Pendant, trouble

    async with Pendant.open(address) as pendant:
        version = await pendant.ask("PolyscopeVersion")
        condition = await pendant.condition()
    values: dict[str, Any] = {
        "version": version,
        "robot_mode": condition.robot_mode,
        "safety_mode": condition.safety_mode,
        "remote_control": condition.remote_control,
    }
    found = f"{version}: {condition.robot_mode}, safety {condition.safety_mode}"
    found += ", remote control" if condition.remote_control else ", local control"
    problem = trouble(address, condition)
    if problem is not None:
        return wrong(DASHBOARD, found, problem.hint, host, **values)
    return ok(DASHBOARD, found, host, **values)


def _check_packets(host: str, address: str) -> Finding:
    """RTDE: how regularly the controller's packets come."""
    from ..robots.ur5.listener import FREQUENCY_HZ, RTDE_PORT, StateListener

    try:
        listener = StateListener(address)
    except (OSError, ValueError) as error:
        raise StartError(f"port {RTDE_PORT} gives no packets: {_reason(error)}", CLOSED) from error
    gaps_ms: list[float] = []
    try:
        begun_ns = last_ns = monotonic_ns()
        while (now_ns := monotonic_ns()) - begun_ns < LISTEN_S * NS_PER_S:
            select.select([listener], [], [], LISTEN_S)
            try:
                packets = listener.read()
            except (OSError, ValueError) as error:
                raise StartError(f"port {RTDE_PORT}: {_reason(error)}", "restart the controller") from error
            now_ns = monotonic_ns()
            for _ in packets:
                gaps_ms.append((now_ns - last_ns) / NS_PER_MS)
                last_ns = now_ns
    finally:
        listener.close()
    if not gaps_ms:
        raise StartError(f"port {RTDE_PORT} takes the connection and sends no packet", "restart the controller")
    rate_hz, gaps = len(gaps_ms) / LISTEN_S, percentiles_ms(gaps_ms)
    found = f"port {RTDE_PORT}: {rate_hz:.0f} packets/s, gaps p50 {gaps['p50']:.1f}, p99 {gaps['p99']:.1f}"
    found += f", max {gaps['max']:.1f} ms"
    values: dict[str, Any] = {"packets_per_s": round(rate_hz, 1), "gap_ms": gaps}
    if rate_hz < GOOD_RATE_HZ:
        mend = "use a cable, not WiFi, between this computer and the controller"
        return note(PACKETS, f"{found}, where {FREQUENCY_HZ:g} were asked for", mend, host, **values)
    return ok(PACKETS, found, host, **values)


def _check_script_ports(host: str, address: str) -> Finding:
    from ..robots.ur5.ports import PORTS

    answers, values = [], {}
    for port in PORTS["script"]:
        begun_ns = monotonic_ns()
        try:
            socket.create_connection((address, port), CONNECT_S).close()
        except OSError as error:
            values[str(port)] = _reason(error)
            answers.append(f"{port} {values[str(port)]}")
        else:
            values[str(port)] = "open"
            answers.append(f"{port} open ({(monotonic_ns() - begun_ns) / NS_PER_MS:.1f} ms)")
    found = f"ports {', '.join(answers)}"
    if set(values.values()) != {"open"}:
        return wrong(SCRIPTS, found, CLOSED, host, ports=values)
    return ok(SCRIPTS, found, host, ports=values)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "does not answer"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error)


# -- a learner ---------------------------------------------------------------------------------------------------------


def check_learner(
    url: str, *, token_file: Path | None, ca: Path | None, environment: Mapping[str, str], pings: int = PINGS
) -> Finding:
    """Whether the learner at `url` would take this robot, and how far away it is; nobody joins it.

    Raises:
        SettingsError: `url` is no address of a learner.
        StartError: there is none, or it cannot be trusted; the token file cannot be used.
    """
    from .. import __version__
    from ..runtime.remote.access import find_token
    from ..runtime.remote.dialing import Dialer, NotNow

    token = find_token(token_file, environment)
    dialer = Dialer(url, token=None, ca=ca, join=None)
    probe = dialer.probe(connect_s=CONNECT_S, hello_s=HELLO_S, pings=pings, every_s=PING_EVERY_S)
    try:
        challenge, round_trips_ms = asyncio.run(probe)
    except NotNow as problem:
        raise StartError(
            f"no learner there: {problem}", "start it with `relod learner --listen`, or check the address and network"
        ) from problem
    values: dict[str, Any] = {
        "relod": challenge.relod,
        "protocol": challenge.protocol,
        "token": challenge.token,
        "image_hw": challenge.image_hw,
        "preset": challenge.preset,
        "round_trips": len(round_trips_ms),
    }
    found = f"relod {challenge.relod}"
    found += f", preset {challenge.preset}" if challenge.preset else ""
    found += f", images {challenge.image_hw[0]}x{challenge.image_hw[1]}" if challenge.image_hw else ""
    if challenge.token and token is None:
        mend = "copy its token file to this host and give it by --token-file, or the token by RELOD_TOKEN"
        return wrong(LEARNER, f"{found}: it asks for a token", mend, url, **values)
    if token is not None and not challenge.token:
        mend = "start the learner with the same token, or the robot without one"
        return wrong(LEARNER, f"{found}: it asks for no token, and a robot with one refuses that", mend, url, **values)
    if not round_trips_ms:
        mend = "look at the network: ping the learner's host"
        return wrong(LEARNER, f"{found}: it answers once, and no ping", mend, url, **values)
    late = percentiles_ms(round_trips_ms)
    values["round_trip_ms"] = late
    found += f"; round trip p50 {late['p50']:.1f}, p99 {late['p99']:.1f}, max {late['max']:.1f} ms"
    if late["p99"] > CYCLE_MS:
        mend = "use a cable or 5 GHz WiFi without power saving, or --mode remote-local"
        return note(LEARNER, f"{found}: in remote-only actions would be late", mend, url, **values)
    if challenge.relod != __version__:
        mend = f"pip install relod=={__version__} there, or relod=={challenge.relod} here"
        return note(LEARNER, f"{found}; this is relod {__version__}", mend, url, **values)
    return ok(LEARNER, found + (", token not tried" if token else ""), url, **values)
