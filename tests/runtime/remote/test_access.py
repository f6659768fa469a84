from __future__ import annotations

import hmac
import ssl
import stat
from pathlib import Path

import pytest

from relod.errors import SettingsError, StartError
from relod.runtime.clock import NS_PER_S
from relod.runtime.remote.access import (
    ADDRESSES_KEPT,
    Attempts,
    Throttle,
    client_tls,
    find_token,
    is_loopback,
    learner_proof,
    make_token,
    read_token,
    robot_proof,
    server_tls,
)
from tests.runtime.remote.certificates import LOCAL_CERT, LOCAL_KEY, LOCKED_KEY, OTHER_CERT, OTHER_KEY

ONE, TWO = b"1" * 16, b"2" * 16
RUN = "0" * 32


def test_a_proof_is_that_of_the_protocol() -> None:
    expected = hmac.digest(b"secret", b"relod-robot" + ONE + TWO + b"arm" + RUN.encode(), "sha256")
    assert robot_proof(b"secret", ONE, TWO, "arm", RUN) == expected


def test_every_part_of_a_proof_matters() -> None:
    proofs = {
        robot_proof(b"secret", ONE, TWO, "arm", RUN),
        learner_proof(b"secret", ONE, TWO, "arm", RUN),  # one end's proof does not serve as the other's
        robot_proof(b"Secret", ONE, TWO, "arm", RUN),
        robot_proof(b"secret", TWO, TWO, "arm", RUN),
        robot_proof(b"secret", ONE, ONE, "arm", RUN),
        robot_proof(b"secret", ONE, TWO, "leg", RUN),
        robot_proof(b"secret", ONE, TWO, "arm", "1" * 32),
    }
    assert len(proofs) == 7


# -- token files -------------------------------------------------------------------------------------------------------


def token_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_made_token_is_its_owners_alone_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "token"
    token = make_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(path) == token
    assert len(token) >= 32
    assert make_token(tmp_path / "another") != token


def test_a_token_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    path = token_file(tmp_path, "secret")
    with pytest.raises(StartError, match=r"token file .*File exists; give a token"):
        make_token(path)
    assert path.read_text() == "secret"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_token_that_others_can_read_is_none(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, "secret", mode)
    with pytest.raises(StartError, match=rf"read by others \(mode {mode:03o}\); run: chmod 600 {path}"):
        read_token(path)


@pytest.mark.parametrize("text", ["", " \n", "x" * 5000])
def test_a_file_without_a_token(tmp_path: Path, text: str) -> None:
    with pytest.raises(StartError, match="holds no token"):
        read_token(token_file(tmp_path, text))


def test_a_token_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="No such file or directory; check the path given to --token-file"):
        read_token(tmp_path / "none")


def test_a_token_is_taken_from_the_file_before_the_environment(tmp_path: Path) -> None:
    path = token_file(tmp_path, " from file\n")
    assert find_token(path, {"RELOD_TOKEN": "from environment"}) == b"from file"
    assert find_token(None, {"RELOD_TOKEN": "from environment\n"}) == b"from environment"
    assert find_token(None, {"RELOD_TOKEN": " "}) is None
    assert find_token(None, {}) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "LocalHost", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.0.7", "workstation", "localhost.example.org", "128.0.0.1"]
)
def test_beyond_loopback(host: str) -> None:
    assert not is_loopback(host)


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    files = {"local.crt": LOCAL_CERT, "local.key": LOCAL_KEY, "other.crt": OTHER_CERT, "other.key": OTHER_KEY}
    for name, text in {**files, "locked.key": LOCKED_KEY, "nonsense": "nonsense"}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory; `ssl.SSLError` when one end does not trust the other."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_side=False, server_hostname=host),
        server.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass


def test_a_robot_trusts_the_certificate_it_was_given(pem: Path) -> None:
    server = server_tls(pem / "local.crt", pem / "local.key")
    client = client_tls("wss://localhost:1", pem / "local.crt")
    assert client is not None
    shake_hands(server, client, "localhost")
    shake_hands(server, client, "127.0.0.1")


def test_a_robot_trusts_no_other_certificate_and_no_other_host(pem: Path) -> None:
    server = server_tls(pem / "other.crt", pem / "other.key")
    wrong_ca, system = client_tls("wss://robot.example", pem / "local.crt"), client_tls("wss://robot.example", None)
    right_ca = client_tls("wss://localhost", pem / "other.crt")
    assert wrong_ca is not None
    assert system is not None
    assert right_ca is not None
    for client in (wrong_ca, system):
        with pytest.raises(ssl.SSLCertVerificationError, match="self-signed certificate"):
            shake_hands(server, client, "robot.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(server, right_ca, "localhost")
    shake_hands(server, right_ca, "robot.example")


def test_an_address_without_tls_has_none(pem: Path) -> None:
    assert client_tls("ws://localhost:1", None) is None
    with pytest.raises(SettingsError, match=r"--ca .* does nothing for ws://localhost:1; write .* wss://"):
        client_tls("ws://localhost:1", pem / "local.crt")


@pytest.mark.parametrize(
    ("cert", "key", "text"),
    [
        ("local.crt", "other.key", "key .*other.key is not that of certificate .*local.crt"),
        ("none", "local.key", "--cert .*none: No such file or directory"),
        ("local.crt", "none", "--key .*none: No such file or directory"),
        ("nonsense", "local.key", "cannot be used: .*; both must be PEM files"),
        ("local.crt", "nonsense", "cannot be used: .*; both must be PEM files"),
        ("local.crt", "locked.key", "cannot be used: .*; both must be PEM files, the key unencrypted"),
    ],
)
def test_certificates_that_cannot_be_used(pem: Path, cert: str, key: str, text: str) -> None:
    with pytest.raises(StartError, match=text):
        server_tls(pem / cert, pem / key)


def test_a_ca_that_cannot_be_used(pem: Path) -> None:
    with pytest.raises(StartError, match=r"--ca .*none: No such file"):
        client_tls("wss://localhost", pem / "none")
    with pytest.raises(StartError, match="nonsense holds no certificate"):
        client_tls("wss://localhost", pem / "nonsense")


# -- limits ------------------------------------------------------------------------------------------------------------


def test_five_wrong_tokens_a_minute() -> None:
    attempts = Attempts()
    for second in range(5):
        assert attempts.wait_s("a", second * NS_PER_S) == 0
        attempts.wrong("a", second * NS_PER_S)
    assert attempts.wait_s("a", 5 * NS_PER_S) == 55
    assert attempts.wait_s("b", 5 * NS_PER_S) == 0
    assert attempts.wait_s("a", 60 * NS_PER_S) == 0  # the first is old, the second is not
    attempts.wrong("a", 60 * NS_PER_S)
    assert attempts.wait_s("a", 60 * NS_PER_S) == 1


def test_wrong_tokens_from_everywhere_take_bounded_memory() -> None:
    attempts = Attempts()
    for number in range(ADDRESSES_KEPT + 10):
        attempts.wrong(str(number), number)
    assert len(attempts._wrong) == ADDRESSES_KEPT


def test_a_sender_is_held_to_its_rate_on_average() -> None:
    throttle = Throttle(100.0)
    assert throttle.take(1000, 0) == 0  # what ten seconds allow, at once
    assert throttle.take(50, 0) == pytest.approx(0.5)
    assert throttle.take(0, NS_PER_S) == 0
    now_s, sent = 1.0, 1050
    while sent < 10_000:
        now_s += throttle.take(30, int(now_s * NS_PER_S))
        sent += 30
    assert sent / now_s == pytest.approx(100.0, rel=0.15)  # and what was left of the ten seconds
