"""The simulated controller's servers: dashboard, scripts and RTDE, on the ports that clients have built in.

To be used on one event loop. What connections do goes to the controller at once; what the controller does is sent by
`follow`. Wires can be broken: see `faults.WireOperation`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, cast

from ...errors import StartError
from ...runtime.clock import NS_PER_S, monotonic_ns
from .controller import Controller
from .dashboard import GREETING, QUIT, Dashboard
from .outputs import INPUTS
from .rtdesession import Claims, RtdeSession
from .script import read_script, split_scripts
from .states import Sample

__all__ = ["PORTS", "Ports", "Server"]

Server: TypeAlias = Literal["dashboard", "script", "rtde"]

PORTS: dict[Server, tuple[int, ...]] = {"dashboard": (29999,), "script": (30001, 30002, 30003), "rtde": (30004,)}
HOSTS = tuple(f"127.0.0.{i}" for i in range(2, 255))  # 127.0.0.1 is left to what a user runs
UNSENT_LIMIT_BYTES = 65_536  # a client that does not read misses data packages, as with a real controller
LINE_LIMIT_BYTES = 4096


class Ports:
    """A controller's servers and their connections."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.dashboard = Dashboard(controller)
        self.claims: Claims = {}
        self.host = ""
        self.connections: list[_Connection] = []
        self.packages = 0  # data packages sent
        self.missed_packages = 0  # by clients that did not read
        self.mute = False  # the dashboard does not answer
        self.frozen = False
        self._frozen_until_ns = self._stalled_until_ns = 0
        self._open_ports: dict[Server, list[asyncio.Server]] = {}
        self._reopening: set[asyncio.Task[None]] = set()

    async def listen(self, host: str | None) -> None:
        """Open all ports on `host`, or on the first address from 127.0.0.2 on where they are free.

        Raises:
            StartError: there is no such address, or its ports are taken.
        """
        problem = None
        for self.host in (host,) if host is not None else HOSTS:
            try:
                for server in PORTS:
                    await self._open(server)
            except OSError as error:
                problem = error
                self._shut(tuple(self._open_ports))
            else:
                return
        hint = "does another emulator use it? --host 127.0.0.9 gives another address"
        raise StartError(f"a controller cannot listen on {self.host}: {problem}", hint) from problem

    async def close(self) -> None:
        """Cut all connections and release the ports."""
        for task in self._reopening:
            task.cancel()
        await asyncio.gather(*self._reopening, return_exceptions=True)
        self._shut(tuple(self._open_ports))

    def follow(self, now_ns: int) -> None:
        """Bring the controller to the present and send what its clients get."""
        if self.frozen and now_ns >= self._frozen_until_ns:
            self.frozen = False
            for connection in self.connections:
                connection.thaw()
        for sample in self.controller.advance(now_ns):
            if self.frozen or now_ns < self._stalled_until_ns:
                continue
            for connection in self.connections:
                if isinstance(connection, _RtdeConnection):
                    connection.send_package(sample)
            if self.controller.witness is not None:
                self.controller.witness.sensed(sample.t_ns, monotonic_ns())

    @property
    def refused_packages(self) -> int:
        """Data packages that did not fit their recipes, from the clients there are."""
        return sum(
            connection.session.refused for connection in self.connections if isinstance(connection, _RtdeConnection)
        )

    # Faults

    def stall(self, seconds: float, now_ns: int) -> None:
        """Send no data packages for a while."""
        self._stalled_until_ns = now_ns + int(seconds * NS_PER_S)

    def freeze(self, seconds: float, now_ns: int) -> None:
        """Hear and say nothing for a while."""
        self.frozen, self._frozen_until_ns = True, now_ns + int(seconds * NS_PER_S)
        for connection in self.connections:
            connection.transport.pause_reading()

    def cut(self, servers: Sequence[Server]) -> None:
        """Cut connections; the ports stay open."""
        for connection in [connection for connection in self.connections if connection.server in servers]:
            connection.transport.abort()

    def hang_up(self, servers: Sequence[Server], seconds: float) -> None:
        """Cut connections and close their ports for a while; those that are closed already stay so for as long."""
        servers = [server for server in servers if server in self._open_ports]
        self._shut(servers)
        task = asyncio.create_task(self._reopen(servers, seconds), name="ur5-reopen")
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    def claim(self, names: Sequence[str]) -> None:
        """Let these input variables, and no others, belong to a client that is not there.

        Raises:
            ValueError: one of them does not exist.
        """
        if unknown := set(names) - INPUTS.keys():
            raise ValueError(f"there is no input variable {min(unknown)!r}")
        for name in [name for name, owner in self.claims.items() if owner is self]:
            del self.claims[name]
        self.claims |= dict.fromkeys(names, self)

    async def _open(self, server: Server) -> None:
        kind = {"dashboard": _DashboardConnection, "script": _ScriptConnection, "rtde": _RtdeConnection}[server]
        ports = self._open_ports.setdefault(server, [])
        for port in PORTS[server]:
            ports.append(await asyncio.get_running_loop().create_server(lambda: kind(self), self.host, port))

    def _shut(self, servers: Sequence[Server]) -> None:
        for server in servers:
            for port in self._open_ports.pop(server, ()):
                port.close()
        self.cut(servers)

    async def _reopen(self, servers: Sequence[Server], seconds: float) -> None:
        await asyncio.sleep(seconds)
        for server in servers:
            try:
                await self._open(server)
            except OSError as error:
                self.controller.note(f"the {server} ports did not open again: {error}", monotonic_ns())


class _Connection(asyncio.Protocol):
    """One client of one of the servers."""

    server: ClassVar[Server]
    transport: asyncio.Transport

    def __init__(self, ports: Ports) -> None:
        self.ports = ports
        self._welcomed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self.ports.connections.append(self)
        if self.ports.frozen:
            self.transport.pause_reading()
        else:
            self.thaw()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ports.connections.remove(self)

    def thaw(self) -> None:
        """Begin, or go on after a freeze."""
        if not self._welcomed:
            self._welcomed = True
            self.welcome()
        if not self.transport.is_reading():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        now_ns = monotonic_ns()
        self.ports.follow(now_ns)
        try:
            self.receive(data, now_ns)
        except ValueError as error:
            self.ports.controller.note(f"{self.server} connection cut: {error}", now_ns)
            self.transport.abort()

    def welcome(self) -> None:
        """Say hello, on servers that do."""

    def receive(self, data: bytes, now_ns: int) -> None:
        """Bytes from the client; ValueError when it makes no sense to go on."""
        raise NotImplementedError


class _RtdeConnection(_Connection):
    server = "rtde"

    def __init__(self, ports: Ports) -> None:
        super().__init__(ports)
        self.session = RtdeSession(ports.controller, ports.claims)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.session.close()

    def receive(self, data: bytes, now_ns: int) -> None:
        if reply := self.session.receive(data, now_ns):
            self.transport.write(reply)

    def send_package(self, sample: Sample) -> None:
        package = self.session.package(sample)
        if not package:
            return
        if self.transport.get_write_buffer_size() > UNSENT_LIMIT_BYTES:
            self.ports.missed_packages += 1
            return
        self.ports.packages += 1
        self.transport.write(package)


class _ScriptConnection(_Connection):
    """A real one also sends the robot's state; its clients here do not read it."""

    server = "script"
    rest = b""

    def receive(self, data: bytes, now_ns: int) -> None:
        scripts, self.rest = split_scripts(self.rest + data)
        for script in scripts:
            self.ports.controller.start_program(*read_script(script), now_ns)


class _DashboardConnection(_Connection):
    server = "dashboard"
    rest = b""

    def welcome(self) -> None:
        self.transport.write(GREETING.encode() + b"\n")

    def receive(self, data: bytes, now_ns: int) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > LINE_LIMIT_BYTES:
            raise ValueError(f"a line of more than {LINE_LIMIT_BYTES} bytes")
        for line in lines:
            command = line.decode("utf-8", "replace").strip()
            answer = self.ports.dashboard.answer(command, now_ns)
            if not self.ports.mute:
                self.transport.write(answer.encode() + b"\n")
            if command.lower() == QUIT:
                self.transport.close()
