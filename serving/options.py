"""What a server is told when it starts, and its limits. Checked here, before anything is opened."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path

from densegeo.errors import ConfigError
from densegeo.files import readable_by_others

MIB = 2**20
MAX_PIXELS = 25_000_000  # of one picture; three bytes each, and four times that as float32
TOKEN_BYTES = 16  # fewer can be guessed


@dataclass(frozen=True, kw_only=True)
class Options:
    """host, port: where to listen (port 0: any free one).

    token: what requests must carry, or None for nobody's. origins: pages of other origins that may ask
    ("https://example.org"). hosts: names by which this server is called, beside loopback's and plain addresses; only
    looked at on a loopback address.
    max_body: bytes of a request, unpacked; max_pixels: of a picture; max_requests: answered at once; max_connections:
    open at once. header_s, body_s: seconds in which a request's head and its body must arrive; write_s: in which a
    client must take something of an answer; idle_s: how long an unused connection is kept. drain_s: how long a server
    told to end goes on taking requests while `ready` says no. Raises ConfigError.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: bytes | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    max_body: int = 64 * MIB
    max_pixels: int = MAX_PIXELS
    max_requests: int = 128
    max_connections: int = 1024
    header_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 30.0
    idle_s: float = 30.0
    drain_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}.")
        for name in ("max_body", "max_pixels", "max_requests", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number above 0, not {getattr(self, name)}.")
        for name in ("header_s", "body_s", "write_s", "idle_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be seconds above 0, not {getattr(self, name)}.")
        if not 0 <= self.drain_s < math.inf:
            raise ConfigError(f"drain_s must be 0 or more seconds, not {self.drain_s}.")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both files: --tls-certificate and --tls-key.")
        for origin in self.origins:
            if re.fullmatch(r"https?://[^/\s*]+", origin) is None:
                raise ConfigError(f"An origin is a scheme and a host, such as https://example.org, not {origin!r}.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_token(path: Path) -> bytes:
    """The token that a file holds, without the line's end. Raises ConfigError."""
    try:
        reason = readable_by_others(path)
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"The token file {path} cannot be read: {error.strerror or error}.") from error
    if reason is not None:
        raise ConfigError(f"The token file {path} {reason}.")
    if len(token) < TOKEN_BYTES or not token.isascii() or b" " in token:
        raise ConfigError(
            f"{path} must hold one token of at least {TOKEN_BYTES} ASCII characters without spaces. Make one: "
            f"`(umask 077; openssl rand -hex 32 > {path})`"
        )
    return token
