"""Who may speak to whom: tokens and their proofs, TLS, and limits on those who have proven nothing yet.

A token is never sent. Each end proves that it knows the token by an HMAC over both ends' nonces, so a proof is worth
nothing to whoever overhears it. Without TLS everything else can be read and changed on the way.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import ssl
import stat
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import SettingsError, StartError
from ..clock import NS_PER_S

__all__ = [
    "TOKEN_VARIABLE",
    "Attempts",
    "Throttle",
    "client_tls",
    "find_token",
    "is_loopback",
    "learner_proof",
    "make_token",
    "read_token",
    "robot_proof",
    "server_tls",
    "split_address",
    "url_of",
]

TOKEN_VARIABLE = "RELOD_TOKEN"
TOKEN_BYTES = 32  # of randomness in a token that is made here
MAX_TOKEN_BYTES = 4096

# A mistyped token is corrected within five tries; a guesser gets five a minute.
WRONG_ALLOWED = 5
WRONG_WINDOW_NS = 60 * NS_PER_S
ADDRESSES_KEPT = 4096

RATE_WINDOW_S = 10  # over which a rate is averaged: a backlog after a short outage passes at full speed


# -- tokens ------------------------------------------------------------------------------------------------------------


def robot_proof(token: bytes, challenge_nonce: bytes, join_nonce: bytes, robot: str, run: str) -> bytes:
    """What a robot's `Join` carries; compare with `hmac.compare_digest`."""
    return _proof(b"relod-robot", token, challenge_nonce, join_nonce, robot, run)


def learner_proof(token: bytes, challenge_nonce: bytes, join_nonce: bytes, robot: str, run: str) -> bytes:
    """What a learner's `Welcome` carries; compare with `hmac.compare_digest`."""
    return _proof(b"relod-learner", token, challenge_nonce, join_nonce, robot, run)


def _proof(role: bytes, token: bytes, challenge_nonce: bytes, join_nonce: bytes, robot: str, run: str) -> bytes:
    # Nonces and run id have fixed lengths, so no two different inputs run together to the same bytes.
    text = role + challenge_nonce + join_nonce + robot.encode() + run.encode()
    return hmac.digest(token, text, hashlib.sha256)


def read_token(path: Path) -> bytes:
    """The token in a file, without white space around it.

    Raises:
        StartError: the file is missing, empty, too long to be a token, or readable by others than its owner.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            token = file.read(MAX_TOKEN_BYTES + 1).strip()
    except OSError as error:
        raise StartError(f"token file {path}: {error.strerror}", "check the path given to --token-file") from error
    if mode & 0o077:
        raise StartError(f"token file {path} can be read by others (mode {mode:03o})", f"run: chmod 600 {path}")
    if not token or len(token) > MAX_TOKEN_BYTES:
        raise StartError(f"token file {path} holds no token", "copy the learner's token file here")
    return token


def find_token(token_file: Path | None, environment: Mapping[str, str]) -> bytes | None:
    """The token of `--token-file`, else that of the variable RELOD_TOKEN, else None. `StartError` as `read_token`."""
    if token_file is not None:
        return read_token(token_file)
    return environment.get(TOKEN_VARIABLE, "").strip().encode() or None


def make_token(path: Path) -> bytes:
    """A new token, in a new file that only its owner can read.

    Raises:
        StartError: the file exists, or cannot be written.
    """
    token = secrets.token_urlsafe(TOKEN_BYTES).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(token + b"\n")
    except OSError as error:
        raise StartError(f"token file {path}: {error.strerror}", "give a token with --token-file") from error
    return token


def split_address(listen: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, an IPv6 address in brackets; `SettingsError` when it is none."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"--listen {listen!r} is no HOST:PORT", "for example --listen 0.0.0.0:8765")
    return host.removeprefix("[").removesuffix("]"), int(port)


def url_of(scheme: str, host: str, port: int) -> str:
    """The address of what listens on `host`; the one that other hosts see, where it listens on all."""
    shown = _own_address() if host in ("", "0.0.0.0", "::") else host
    return f"{scheme}://{f'[{shown}]' if ':' in shown else shown}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, a name or an address; names other than localhost count as not."""
    bare = host.strip("[]")
    if bare.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


# -- TLS ---------------------------------------------------------------------------------------------------------------


def server_tls(cert: Path, key: Path) -> ssl.SSLContext:
    """A learner's side of TLS, from PEM files: its certificate (and those between it and the CA) and its key.

    Raises:
        StartError: a file cannot be read, is no PEM or encrypted, or the key is not the certificate's.
    """
    for option, path in (("--cert", cert), ("--key", key)):
        _check_readable(option, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never ask at the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartError(f"key {key} is not that of certificate {cert}", "give the pair that was made") from error
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise StartError(
            f"certificate {cert} or key {key} cannot be used: {reason}", "both must be PEM files, the key unencrypted"
        ) from error
    return context


def client_tls(url: str, ca: Path | None) -> ssl.SSLContext | None:
    """A robot's side of TLS; None for a URL that is not wss://. The certificate must name the URL's host.

    Args:
        ca: PEM file to trust instead of the system's authorities: one's own, or the learner's certificate itself.

    Raises:
        SettingsError: a `ca` with a URL that does not use it.
        StartError: the file cannot be read, or holds no certificate.
    """
    if urlsplit(url).scheme != "wss":
        if ca is not None:
            raise SettingsError(f"--ca {ca} does nothing for {url}", "write the learner's address as wss://HOST:PORT")
        return None
    if ca is None:
        return ssl.create_default_context()
    _check_readable("--ca", ca)
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except ssl.SSLError as error:
        raise StartError(f"{ca} holds no certificate", "give a PEM file to --ca") from error
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust a learner's own certificate whoever issued it
    return context


def _check_readable(option: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise StartError(f"{option} {path}: {error.strerror}", f"check the path given to {option}") from error


# -- limits ------------------------------------------------------------------------------------------------------------


class Attempts:
    """Wrong proofs by address. After `WRONG_ALLOWED` within the window an address waits until one of them is old."""

    def __init__(self) -> None:
        self._wrong: dict[str, deque[int]] = {}  # by when the newest was, oldest first

    def wait_s(self, address: str, now_ns: int) -> float:
        """How long this address must wait for its next attempt; 0 when it need not."""
        times = self._wrong.get(address)
        if times is None or len(times) < WRONG_ALLOWED:
            return 0.0
        return max(0, times[0] + WRONG_WINDOW_NS - now_ns) / NS_PER_S

    def wrong(self, address: str, now_ns: int) -> None:
        """A wrong proof came from this address."""
        times = self._wrong.pop(address, deque(maxlen=WRONG_ALLOWED))
        times.append(now_ns)
        self._wrong[address] = times
        if len(self._wrong) > ADDRESSES_KEPT:
            del self._wrong[next(iter(self._wrong))]


class Throttle:
    """Holds a sender to a rate, averaged over `RATE_WINDOW_S`: it is read more slowly, and nothing of it is lost."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._level_bytes = 0.0  # what came, less what the rate allowed since
        self._last_ns = 0

    def take(self, size_bytes: int, now_ns: int) -> float:
        """Seconds to wait before the next message is read, after one of this size."""
        allowed = self._rate * (now_ns - self._last_ns) / NS_PER_S
        self._level_bytes = max(0.0, self._level_bytes - allowed) + size_bytes
        self._last_ns = now_ns
        return max(0.0, self._level_bytes / self._rate - RATE_WINDOW_S)


def _own_address() -> str:
    """This host's address on its way to others; its name where it has none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of nobody (RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
