"""What the doctor says of learners and UR controllers that answer, refuse or are none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from relod import __version__
from relod.doctor.finding import Finding, State, guarded
from relod.doctor.network import check_learner, check_ur5, is_path
from relod.runtime.remote import wire
from tests.robots.ur5.emulated import emulated

NOBODY = "ws://127.0.0.1:1"


@contextlib.contextmanager
def greeter(**fields: Any) -> Iterator[str]:
    """A learner that never gets beyond its challenge; its address."""
    usual = {"protocol": wire.PROTOCOL, "relod": __version__, "nonce": bytes(wire.NONCE_BYTES), "token": False}
    challenge = wire.pack(wire.Challenge(**(usual | fields)))

    def greet(connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            connection.send(challenge)
            connection.recv()

    protocols = [Subprotocol(wire.SUBPROTOCOL)]
    with serve(greet, "127.0.0.1", 0, subprotocols=protocols, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def asked(url: str, token_file: Path | None = None, **environment: str) -> Finding:
    (finding,) = guarded(
        "learner", lambda: check_learner(url, token_file=token_file, ca=None, environment=environment, pings=4), url
    )
    return finding


def test_a_learner_says_what_it_wants_and_how_far_away_it_is():
    with greeter(preset="sac-lite", image_hw=(48, 64)) as url:
        finding = asked(url)
    assert finding.state in (State.OK, State.NOTE)  # on a busy machine even the loopback may take a cycle
    assert finding.found.startswith(f"relod {__version__}, preset sac-lite, images 48x64; round trip p50 ")
    assert finding.values["round_trips"] == 4
    assert finding.values["round_trip_ms"]["p50"] <= finding.values["round_trip_ms"]["max"]


def test_tokens_must_be_on_both_ends(tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text("secret")
    with greeter(token=True) as url:
        assert "it asks for a token" in asked(url).found
        assert "it asks for a token" not in asked(url, RELOD_TOKEN="secret").found
        readable = asked(url, token_file)
        assert (readable.state, readable.mend) == (State.WRONG, f"run: chmod 600 {token_file}")
        token_file.chmod(0o600)
        assert "it asks for a token" not in asked(url, token_file).found
    with greeter() as url:
        assert "it asks for no token" in asked(url, token_file).found


def test_other_versions():
    with greeter(relod="0.0.9") as url:
        finding = asked(url)
        assert finding.state is State.NOTE
    with greeter(protocol=99) as url:
        finding = asked(url)
        assert finding.state is State.WRONG
        assert "speaks protocol 99" in finding.found


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (NOBODY, "no learner there: connection refused"),
        ("127.0.0.1:8765", "is no address of a learner"),
        ("http://127.0.0.1:8765", "is no address of a learner"),
        ("ws://no-such-host.invalid:8765", "no-such-host.invalid"),
        ("", "is no address of a learner"),
    ],
)
def test_a_learner_that_is_none_is_one_line(url, said):
    finding = asked(url)
    assert finding.state is State.WRONG
    assert said in finding.found
    assert finding.mend
    assert "\n" not in finding.found


def test_addresses_of_robots():
    assert [is_path(text) for text in ("/dev/ttyUSB0", "rig.sock", "192.168.1.10", "./rig.sock")] == [
        *(True, False, False, True)
    ]


@pytest.mark.parametrize("host", ["no-such-host.invalid", "", "a" * 300, "::bad::"])
def test_a_host_that_there_is_not_is_one_line(host):
    findings = check_ur5(host)
    assert {finding.state for finding in findings} == {State.WRONG}
    assert all(finding.mend for finding in findings)


def test_a_host_without_a_controller():
    findings = check_ur5("127.0.0.1")
    assert [finding.name for finding in findings] == ["UR5 dashboard", "UR5 packets", "UR5 scripts"]
    assert {finding.state for finding in findings} == {State.WRONG}


@pytest.mark.slow
def test_a_controller(tmp_path):
    with emulated(tmp_path) as robot:
        dashboard, packets, scripts = check_ur5(robot.host)
        assert (dashboard.state, dashboard.values["robot_mode"]) == (State.OK, "RUNNING")
        assert packets.values["packets_per_s"] > 10
        assert scripts.values["ports"] == {"30001": "open", "30002": "open", "30003": "open"}
        robot.do("emergency_stop", pressed=True)
        stopped = check_ur5(robot.host)[0]
        assert stopped.state is State.WRONG
        assert stopped.mend.startswith("release it")
