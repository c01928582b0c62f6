"""The controller's folder of keys: the hub's own pair, and the list of those who may connect.

<keys>/hub.json              the hub's pair, and the address to which services connect          mode 0600
<keys>/allowed/NAME.json     one service: its role, its public key, since when
<keys>/revoked/NAME.json     one that may no longer connect
<keys>/local/NAME.key.json   key files of services that `ami up` runs beside the controller                  mode 0600
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ami_shared.bus import HubAddress
from ami_shared.errors import ConfigurationError
from ami_shared.files import rename, write_whole
from ami_shared.keys import ROLES, Credentials, KeyFile, Pair, key_of, refuse_if_others_can_read, write_secret
from ami_shared.names import NAME_RULE, is_name

INIT = "ami keys init"
RESERVED = "controller"


@dataclass(frozen=True)
class Peer:
    """The owner of a key that the hub knows."""

    name: str
    role: str
    public: bytes
    added: float = 0.0


@dataclass(frozen=True)
class Listing:
    """What a list of keys says.

    Attributes:
        peers: of the entries.
        odd: name → what is wrong with its file, which is no entry.
    """

    peers: list[Peer]
    odd: dict[str, str]


class KeyFolder:
    """One folder of keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._allowed, self._revoked, self._hub = folder / "allowed", folder / "revoked", folder / "hub.json"

    def init(self, hub: HubAddress) -> bool:
        """Make the hub's pair; return False if there is one already, which is left unchanged.

        Raises:
            ConfigurationError: the folder cannot be written to.
        """
        if self._hub.exists():
            return False
        pair = Pair.new()
        content = {"hub": str(hub), "public": pair.public.decode(), "secret": pair.secret.decode()}
        try:
            self._allowed.mkdir(parents=True, exist_ok=True)
            self._revoked.mkdir(exist_ok=True)
            write_secret(self._hub, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ConfigurationError(f"{self.folder} cannot be written to: {error.strerror}") from None
        return True

    def add(self, name: str, role: str, to: Path, hub: str | None = None) -> None:
        """Admit a new service, and write its key file.

        Args:
            name: of the service.
            role: body, trainer, operator or observer.
            to: where to write the key file, which must be copied to the service's machine.
            hub: host:port to which this service connects; None = that of the folder.

        Raises:
            ConfigurationError: the name is taken or invalid, or a folder cannot be written to.
        """
        if not is_name(name) or name == RESERVED:
            raise ConfigurationError(
                f"{name!r:.80} cannot be a service's name, which has {NAME_RULE}; {RESERVED} is reserved"
            )
        if role not in ROLES:
            raise ConfigurationError(f"--role {role}: choose from {', '.join(ROLES)}")
        own, address = self.pair(), hub or self.hub()
        HubAddress.parse(address)
        if (self._allowed / f"{name}.json").exists():
            raise ConfigurationError(
                f"{name} has a key already: `ami keys revoke {name}` first, or choose another name"
            )
        if to.exists():
            raise ConfigurationError(f"{to} exists: move it away, or choose another place with --to")
        pair = Pair.new()
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            KeyFile(name, role, address, Credentials(own.public, pair)).write(to)
        except OSError as error:
            raise ConfigurationError(f"{error.filename or to} cannot be written: {error.strerror}") from None
        try:
            self._let_in(name, role, pair.public)
        except ConfigurationError:
            to.unlink(missing_ok=True)  # a key that is on no list
            raise

    def _let_in(self, name: str, role: str, public: bytes) -> None:
        entry = {"name": name, "role": role, "public": public.decode(), "added": time.time()}
        path = self._allowed / f"{name}.json"
        try:
            self._allowed.mkdir(exist_ok=True)
            write_whole(path, [json.dumps(entry, indent=1).encode() + b"\n"])
        except OSError as error:
            raise ConfigurationError(f"{error.filename or path} cannot be written: {error.strerror}") from None

    def local(self, name: str, role: str) -> Path:
        """Return the key file of a service on this machine, which is made if it does not exist.

        Raises:
            ConfigurationError: the name belongs to a key whose file is elsewhere, the key was revoked, or a folder
                cannot be written to.
        """
        path = self.folder / "local" / f"{name}.key.json"
        if not path.exists():
            self.add(name, role, path)
            return path
        public = KeyFile.load(path).credentials.pair.public
        allowed = self.allowed()
        if name in allowed.odd:
            raise ConfigurationError(allowed.odd[name])
        listed = {peer.name: peer for peer in allowed.peers}.get(name)
        if listed and listed.public == public:
            return path
        if listed:
            raise ConfigurationError(
                f"{path} is not the key that {name} has now: put the file of `ami keys add {name}` in its place"
            )
        if any(peer.name == name for peer in self.revoked().peers):  # the list has only the last key of a name
            raise ConfigurationError(f"the key of {name} was revoked: remove {path}, and it gets a new one")
        self._let_in(name, role, public)  # the process that made the file was killed before doing so
        return path

    def has_or_had(self, name: str) -> bool:
        """Return whether the service has a key, or had one that was revoked."""
        return any((folder / f"{name}.json").exists() for folder in (self._allowed, self._revoked))

    def revoke(self, name: str) -> None:
        """Revoke a service's key; a running controller disconnects the service within two seconds."""
        if not is_name(name) or not (self._allowed / f"{name}.json").exists():
            raise ConfigurationError(f"{name!r:.80} has no key: see `ami keys list`")
        try:
            self._revoked.mkdir(exist_ok=True)
            rename(self._allowed / f"{name}.json", self._revoked / f"{name}.json")
        except OSError as error:
            raise ConfigurationError(
                f"{self._revoked} cannot be written to ({error.strerror}): {name} is NOT revoked"
            ) from None

    def allowed(self) -> Listing:
        """Return who may connect."""
        return self._listing(self._allowed)

    def revoked(self) -> Listing:
        """Return whose keys were revoked."""
        return self._listing(self._revoked)

    @staticmethod
    def _listing(folder: Path) -> Listing:
        listing = Listing([], {})
        for path in sorted(folder.glob("*.json")):
            try:
                listing.peers.append(_entry(path))
            except (ConfigurationError, OSError, ValueError, KeyError, TypeError, AttributeError):
                listing.odd[path.stem] = f"{path} is not an entry of `ami keys add`: move it away"
        return listing

    def changes(self) -> object:
        """Return a value that differs after every change of the list; raise OSError if it cannot be read."""
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(self._allowed))

    def pair(self) -> Pair:
        """Return the hub's pair.

        Raises:
            ConfigurationError: there is none, or other users can read it.
        """
        content = self._read_hub()
        return Pair(*(key_of(str(content.get(key)), str(self._hub)) for key in ("public", "secret")))

    def hub(self) -> str:
        """Return host:port to which services connect."""
        return str(self._read_hub().get("hub"))

    def _read_hub(self) -> dict[str, object]:
        try:
            refuse_if_others_can_read(self._hub)
            content = json.loads(self._hub.read_text())
        except FileNotFoundError:
            raise ConfigurationError(
                f"{self.folder} has no keys: make them with `{INIT} --dir {self.folder}`"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{self._hub} cannot be read: {error.strerror}") from None
        except ValueError:
            raise ConfigurationError(f"{self._hub} is not a file of `{INIT}`") from None
        if not isinstance(content, dict):
            raise ConfigurationError(f"{self._hub} is not a file of `{INIT}`")
        return content


def _entry(path: Path) -> Peer:
    content = json.loads(path.read_text())
    name, role = content["name"], content["role"]
    if name != path.stem or role not in ROLES:
        raise ValueError
    return Peer(name, role, key_of(content["public"], str(path)), float(content["added"]))
