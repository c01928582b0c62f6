"""Lockstep, the trainers' side: learn at the ends of windows only, and say when that is done. The body's side waits.

So which versions of other models a trainer learns with does not depend on anybody's speed: same seed, same curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ami_shared.settled import Settled, is_window_end
from ami_trainer.training import Training

Frontiers = Mapping[str, tuple[str, int]]  # body → its incarnation, and the number after its last record consumed


class Intake(Protocol):
    """How far the bodies' streams have come into the buffer."""

    @property
    def consumed(self) -> Frontiers: ...


class Replicas(Protocol):
    """The models that the trainer follows."""

    def newest_versions(self) -> Mapping[str, int]: ...


class Lockstep:
    """The pace of a training loop whose bodies wait for it."""

    def __init__(
        self,
        window: int,
        training: Training,
        intake: Intake,
        replicas: Replicas,
        publish: Callable[[], None],
        say_settled: Callable[[Mapping[str, int]], None],
    ) -> None:
        """Start with nothing settled.

        Args:
            window: steps between two waits of a body.
            publish: makes the models known as they are.
            say_settled: says behind them that all records before these frontiers have been learned from.
        """
        self._window, self._training, self._intake, self._replicas = window, training, intake, replicas
        self._publish, self._say_settled = publish, say_settled
        self._marked: Frontiers = {}
        self._settled_through: dict[str, int] = {}
        self._published = 0  # gradient steps whose outcome everybody has
        self._heard: dict[str, Settled] = {}

    def mark(self) -> None:
        """Note what is there to learn from: what comes later is not meant by what follows."""
        self._marked = dict(self._intake.consumed)

    def may_train(self) -> bool:
        """Whether there is a window that is whole and has not been settled.

        A body that was let go on may have begun the next one since the mark: that is not to be learned from yet.
        """
        return self._at_end() and dict(self._marked.values()) != self._settled_through

    def _at_end(self) -> bool:
        """Whether all bodies are at the end of a window, and the models followed have learned from it already."""
        at_end = all(is_window_end(frontier, self._window) for _, frontier in self._marked.values())
        return at_end and all(self._has_learned(*held) for held in self._replicas.newest_versions().items())

    def _has_learned(self, model: str, held: int) -> bool:
        return any(
            settled.versions.get(model, held + 1) <= held
            and all(settled.frontiers.get(life, 0) >= frontier for life, frontier in self._marked.values())
            for settled in list(self._heard.values())
        )

    def heard(self, settled: Settled) -> None:
        """Wake only for news: a trainer hears itself as well, and each time it wakes it says again that it settled."""
        if self._heard.get(settled.trainer) != settled:
            self._heard[settled.trainer] = settled
            self._training.new_data()

    def settle(self) -> None:
        """Publish what the windows have taught, and let the bodies go on; also one that begins its first window."""
        if self._at_end():
            self._settled_through = dict(self._marked.values())
            if self._training.updates > self._published:
                self._published = self._training.updates
                self._publish()
        self._say_settled(self._settled_through)
