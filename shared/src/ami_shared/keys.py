"""Keys for a hub's ports: with them a service proves its identity and recognises the hub.

A key file is one small JSON file, made by `ami keys add` on the controller's machine and copied to the service's:

    {"name": …, "role": …, "hub": "host:port", "hub_public": …, "public": …, "secret": …}        keys as Z85 text
"""

from __future__ import annotations

import json
import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from ami_shared.errors import ConfigurationError
from ami_shared.files import rename
from ami_shared.names import is_name

ROLES = ("body", "trainer", "operator", "observer")
HAS_MODES = os.name == "posix"  # on Windows the folder's own permissions must suffice
KEY_TEXT = 40  # characters of a key's 32 bytes in Z85


@dataclass(frozen=True)
class Pair:
    """A Curve25519 key pair, each key as 40 bytes of Z85 text."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def new(cls) -> Pair:
        """Generate a new pair."""
        return cls(*zmq.curve_keypair())


@dataclass(frozen=True)
class Credentials:
    """The keys of a connecting socket: its own pair, and the public key by which it recognises the hub."""

    hub_public: bytes
    pair: Pair

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Set a socket's options, before it connects."""
        socket.curve_serverkey = self.hub_public
        socket.curve_publickey, socket.curve_secretkey = self.pair.public, self.pair.secret


@dataclass(frozen=True)
class Door:
    """The keys of a listening socket: the hub's pair, and the name by which its doorkeeper knows this port."""

    pair: Pair
    domain: str

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Set a socket's options, before it binds. Without a doorkeeper no connection is admitted."""
        socket.setsockopt(zmq.ZAP_DOMAIN, self.domain.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.curve_secretkey = self.pair.secret
        socket.curve_server = True


@dataclass(frozen=True)
class KeyFile:
    """One service's key file.

    Attributes:
        hub: host:port to which the service connects.
    """

    name: str
    role: str
    hub: str
    credentials: Credentials

    @classmethod
    def load(cls, path: Path) -> KeyFile:
        """Read a key file.

        Raises:
            ConfigurationError: it is missing, broken, or others can read it.
        """
        try:
            refuse_if_others_can_read(path)
            content = json.loads(path.read_text())
        except OSError as error:
            raise ConfigurationError(f"key file {path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise ConfigurationError(f"key file {path} is not a file of `ami keys add`") from None
        wanted = ("name", "role", "hub", "hub_public", "public", "secret")
        if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in wanted):
            raise ConfigurationError(f"key file {path} is not a file of `ami keys add`")
        hub_public, public, secret = (key_of(content[key], f"key file {path}") for key in wanted[3:])
        if content["role"] not in ROLES or not is_name(content["name"]):
            raise ConfigurationError(f"key file {path} lacks the name and role of a service")
        return cls(content["name"], content["role"], content["hub"], Credentials(hub_public, Pair(public, secret)))

    def write(self, path: Path) -> None:
        """Write it readable by its owner only; raise OSError if that is impossible."""
        content = {
            "name": self.name,
            "role": self.role,
            "hub": self.hub,
            "hub_public": self.credentials.hub_public.decode(),
            "public": self.credentials.pair.public.decode(),
            "secret": self.credentials.pair.secret.decode(),
        }
        write_secret(path, json.dumps(content, indent=1) + "\n")


def key_of(text: str, where: str) -> bytes:
    """Return a key from its Z85 text; raise ConfigurationError, which does not show it, if it is invalid."""
    key = text.encode("ascii", "replace")
    try:
        fits = text.isascii() and len(key) == KEY_TEXT and len(z85.decode(key)) == 32
    except (KeyError, ValueError, IndexError, struct.error):  # the last: a group of five that no four bytes are
        fits = False
    if not fits:
        raise ConfigurationError(f"{where} has a key that is not {KEY_TEXT} characters of Z85")
    return key


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all (permissions are set on POSIX only)."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def refuse_if_others_can_read(path: Path) -> None:
    """Raise ConfigurationError if other users of this machine can read a secret file."""
    if path.is_dir():
        raise ConfigurationError(f"key file {path} is a folder: give the path of the file in it")
    if not HAS_MODES:
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigurationError(f"key file {path} can be read by others (mode {mode:o}): chmod 600 {path}")
