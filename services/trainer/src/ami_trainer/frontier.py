"""What a trainer has of each body's stream: in order, exactly once, or counted as lost. No sockets here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """What to do with a batch.

    Attributes:
        skip: how many of its first records are here already.
        lost: how many records before it are missing for good.
        continues: whether its first new record follows the last one taken, without a gap.
    """

    skip: int
    lost: int
    continues: bool


@dataclass
class BodyFrontier:
    """One body's stream as seen from here."""

    incarnation: str
    next_sequence: int
    received: int = 0
    lost: int = 0
    duplicates: int = 0
    broken: bool = False  # the last records accepted were refused


class Frontiers:
    """One frontier for each body, from where it is first heard on; a later incarnation of a known body begins at 0."""

    def __init__(self) -> None:
        self.bodies: dict[str, BodyFrontier] = {}

    def accept(self, body: str, incarnation: str, first: int, count: int) -> Accepted:
        """Take note of `count` records from sequence number `first` on."""
        known = self.bodies.get(body)
        if known is None or known.incarnation != incarnation:
            begun = BodyFrontier(incarnation, first if known is None else 0)
            if known is not None:
                begun.received, begun.lost, begun.duplicates = known.received, known.lost, known.duplicates
            self.bodies[body] = begun
            return self._advance(begun, first, count, continues=False)
        return self._advance(known, first, count, continues=first <= known.next_sequence and not known.broken)

    @staticmethod
    def _advance(frontier: BodyFrontier, first: int, count: int, continues: bool) -> Accepted:
        skip = min(count, max(0, frontier.next_sequence - first))
        lost = max(0, first - frontier.next_sequence)
        frontier.duplicates += skip
        frontier.broken &= skip == count
        frontier.lost += lost
        frontier.received += count - skip
        frontier.next_sequence = max(frontier.next_sequence, first + count)
        return Accepted(skip, lost, continues)

    def refuse(self, body: str, count: int) -> None:
        """The last `count` records accepted did not fit the buffer after all: they are lost, and a gap."""
        self.bodies[body].received -= count
        self.bodies[body].lost += count
        self.bodies[body].broken = True

    def received(self) -> dict[str, int]:
        """Records taken, by body."""
        return {body: frontier.received for body, frontier in list(self.bodies.items())}

    def lost(self) -> dict[str, int]:
        """Records missing for good, by body."""
        return {body: frontier.lost for body, frontier in list(self.bodies.items())}
