"""Frames that nobody should send: random ones, and messages with something wrong with them."""

from __future__ import annotations

import random
from collections.abc import Sequence

Frames = list[bytes]


def random_frames(chance: random.Random) -> Frames:
    """Return some frames of anything."""
    return [chance.randbytes(chance.choice((0, 1, 9, 60, 300))) for _ in range(chance.randrange(1, 6))]


def mutated(frames: Sequence[bytes | memoryview], chance: random.Random) -> Frames:
    """Return a message's frames with one to four things wrong with them."""
    made = [bytearray(frame) for frame in frames]
    for _ in range(chance.randrange(1, 5)):
        frame = chance.choice(made) if made else bytearray()
        at = chance.randrange(len(frame) + 1)
        match chance.randrange(8):
            case 0 | 1 | 2 if at < len(frame):
                frame[at] ^= 1 << chance.randrange(8)
            case 3:
                frame[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                del frame[at : at + chance.randrange(1, 9)]
            case 5:
                del frame[at:]
            case 6 if made:
                made.insert(chance.randrange(len(made)), bytearray(frame))
            case 7 if made:
                made.pop(chance.randrange(len(made)))
    return [bytes(frame) for frame in made]
