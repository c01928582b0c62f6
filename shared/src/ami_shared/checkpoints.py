"""What services and the controller say to each other to save and to restore.

save      controller → service   take part in the cut `checkpoint`; repeated until offered or refused
offer     service → controller   the files of its part, held in memory: [[path, bytes], …]
unsaved   service → controller   why it cannot take part
get_part  either → the other     a piece of a file
part      the answer             the piece
forget    controller → service   the files are not needed any more
damaged   service → controller   what arrived is not what was saved: is there another checkpoint?

A save asks services for the files that they offer; a service that joins asks the controller for those of its part.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from ami_shared import limits
from ami_shared.errors import WireError
from ami_shared.state import StateFile
from ami_shared.wire import Message

SAVE, OFFER, UNSAVED, GET_PART, PART, FORGET = "save", "offer", "unsaved", "get_part", "part", "forget"
DAMAGED = "damaged"


@dataclass(frozen=True)
class Cut:
    """One consistent moment of the whole system: before the next record of each of these bodies.

    Attributes:
        checkpoint: id of this cut; unique, even among cuts for a checkpoint of the same name.
        bodies: all bodies that take part.
    """

    checkpoint: str
    bodies: tuple[str, ...]

    def to_list(self) -> list[Any]:
        """Return the form that is sent."""
        return [self.checkpoint, list(self.bodies)]

    @classmethod
    def from_list(cls, value: object) -> Cut:
        """Parse a cut; raise WireError if it is malformed."""
        match value:
            case [str(checkpoint), list(bodies)] if len(bodies) <= limits.MOST_BODIES:
                if 0 < len(checkpoint) <= limits.MAX_NAME_LENGTH and all(isinstance(name, str) for name in bodies):
                    return cls(checkpoint, tuple(bodies))
        raise WireError("a cut is not [checkpoint, [body…]]")


@dataclass(frozen=True)
class Piece:
    """Which bytes of which file."""

    checkpoint: str
    path: str
    offset: int

    def fields(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint, "path": self.path, "offset": self.offset}

    @classmethod
    def of(cls, message: Message) -> Piece:
        """Return the piece that a get_part or part message is about; raise WireError if it is malformed."""
        offset = message.get("offset", int)
        if not 0 <= offset < limits.MAX_NUMBER:
            raise WireError(f"{message.kind}: offset {offset} out of range")
        return cls(message.get("checkpoint", str), message.get("path", str), offset)

    def answer(self, sender: str, incarnation: str, content: bytes) -> Message:
        """Return the part message from which bytes_of() reads the content."""
        return Message(PART, sender, incarnation, self.fields(), {"bytes": np.frombuffer(content, np.uint8)})


def bytes_of(message: Message) -> memoryview:
    """Return the content of a part; raise WireError if there is none."""
    content = message.arrays.get("bytes")
    if content is None or content.ndim != 1 or content.dtype != np.uint8 or not 0 < content.size <= limits.STATE_CHUNK:
        raise WireError("part: it carries no bytes, or too many")
    return content.data


def sizes_of(message: Message) -> dict[str, int]:
    """Return path → size in bytes of the offered files; raise WireError if the offer is malformed."""
    files = message.get("files", list)
    if len(files) > limits.MOST_STATE_FILES:
        raise WireError(f"offer: {len(files)} files, limit {limits.MOST_STATE_FILES}")
    sizes = {}
    for file in files:
        match file:
            case [str(path), int(size)] if 0 < size < limits.MAX_NUMBER and type(size) is int:
                sizes[path] = size
            case _:
                raise WireError("offer: a file is not [path, bytes]")
    return sizes


class Offered:
    """The files of this service's part in the newest cut, for as long as the controller may want them."""

    def __init__(self) -> None:
        self._kept: tuple[str, dict[str, StateFile]] = ("", {})
        self._lock = threading.Lock()  # one thread puts, another reads and forgets

    def put(self, checkpoint: str, files: Iterable[StateFile]) -> None:
        """Keep the files of a cut; they replace those of the previous one."""
        kept = (checkpoint, {file.path: file for file in files})
        with self._lock:
            self._kept = kept

    def sizes(self, checkpoint: str) -> list[list[Any]] | None:
        """Return [[path, bytes], …] to offer for a checkpoint; None if its cut has not been taken."""
        kept, files = self._kept
        return [[file.path, file.nbytes] for file in files.values()] if checkpoint == kept else None

    def read(self, piece: Piece) -> bytes | None:
        """Return a piece's bytes; None if the file is not here."""
        kept, files = self._kept
        file = files.get(piece.path) if piece.checkpoint == kept else None
        return (file.read(piece.offset, limits.STATE_CHUNK) or None) if file else None

    def forget(self, checkpoint: str) -> None:
        """Release the memory."""
        with self._lock:
            if checkpoint == self._kept[0]:
                self._kept = (checkpoint, {})


@dataclass(frozen=True)
class Described:
    """A file of a checkpoint as its manifest describes it."""

    path: str
    nbytes: int
    digest: str

    @classmethod
    def all_of(cls, value: object) -> tuple[Described, ...]:
        """Parse [[path, bytes, sha256], …]; raise WireError if it is malformed."""
        found = []
        for entry in value if isinstance(value, list) else [None]:
            match entry:
                case [str(path), int(nbytes), str(digest)] if nbytes > 0 and type(nbytes) is int:
                    found.append(cls(path, nbytes, digest))
                case _:
                    raise WireError("checkpoint: a file is not [path, bytes, sha256]")
        return tuple(found)


class Fetching:
    """Takes the files of this service's part from the controller, piece by piece. No sockets here."""

    def __init__(self, checkpoint: str, files: Sequence[Described]) -> None:
        self.checkpoint = checkpoint
        self._wanted = {file.path: file for file in files}
        self._contents = {file.path: bytearray(file.nbytes) for file in files}
        self._reached = dict.fromkeys(self._wanted, 0)
        self._asked: tuple[Piece, float] | None = None

    def wish(self, now: float) -> Piece | None:
        """Return the piece to ask for now, if any."""
        path = next((path for path, file in self._wanted.items() if self._reached[path] < file.nbytes), None)
        if path is None:
            return None
        piece = Piece(self.checkpoint, path, self._reached[path])
        if self._asked and self._asked[0] == piece and now - self._asked[1] < limits.CHUNK_PATIENCE:
            return None
        self._asked = (piece, now)
        return piece

    def take(self, message: Message) -> None:
        """Take in a part; one that was not asked for, or is a repetition, is ignored."""
        piece = Piece.of(message)
        if self._asked and piece == self._asked[0] and self._reached.get(piece.path) == piece.offset:
            part = bytes_of(message)[: self._wanted[piece.path].nbytes - piece.offset]
            self._contents[piece.path][piece.offset : piece.offset + len(part)] = part
            self._reached[piece.path] += len(part)

    @property
    def complete(self) -> bool:
        return all(self._reached[path] >= file.nbytes for path, file in self._wanted.items())

    def files(self) -> dict[str, bytearray]:
        """Return path → content, once complete; raise WireError if a file differs from the manifest."""
        for path, content in self._contents.items():
            if sha256(content).hexdigest() != self._wanted[path].digest:
                raise WireError(f"{path} of checkpoint {self.checkpoint} did not arrive as it was written")
        return self._contents
