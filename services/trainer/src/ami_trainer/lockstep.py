"""Lockstep, the trainers' side: learn only at the ends of windows, and announce when that is done, while bodies wait.

So the versions of other models with which a trainer learns do not depend on any speed: same seed, same curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ami_shared.settled import Settled, is_window_end
from ami_trainer.training import Training

Frontiers = Mapping[str, tuple[str, int]]  # body → its incarnation, and the number after its last record consumed


class Consuming(Protocol):
    """How far the streams of those bodies that have not left have reached the buffer."""

    @property
    def present(self) -> Frontiers: ...


class Following(Protocol):
    """The models that the trainer follows."""

    def newest_versions(self) -> Mapping[str, int]: ...


class Lockstep:
    """The pace of a training loop whose bodies wait for it."""

    def __init__(
        self,
        window: int,
        training: Training,
        intake: Consuming,
        replicas: Following,
        publish: Callable[[], None],
        say_settled: Callable[[Mapping[str, int]], None],
    ) -> None:
        """Start with nothing settled.

        Args:
            window: steps between two waits of a body.
            training: the training loop.
            intake: tells how far the streams have been consumed.
            replicas: the followed models.
            publish: publishes the models as they are.
            say_settled: announces, after them, that all records before the given frontiers have been learned from.
        """
        self._window, self._training, self._intake, self._replicas = window, training, intake, replicas
        self._publish, self._say_settled = publish, say_settled
        self._marked: Frontiers = {}
        self._settled_through: dict[str, int] = {}
        self._published = 0  # gradient steps whose outcome has been published
        self._heard: dict[str, Settled] = {}

    def mark(self) -> None:
        """Note what there is to learn from: later records are not included in what follows."""
        self._marked = dict(self._intake.present)

    def may_train(self) -> bool:
        """Return whether there is a complete window that has not been settled.

        A body that was allowed to continue may have begun the next one since the mark, which must not be used yet.
        """
        return self._at_end() and dict(self._marked.values()) != self._settled_through

    def _at_end(self) -> bool:
        """Return whether all bodies are at the end of a window, from which the followed models have learned already."""
        at_end = all(is_window_end(frontier, self._window) for _, frontier in self._marked.values())
        return at_end and all(self._has_learned(*held) for held in self._replicas.newest_versions().items())

    def _has_learned(self, model: str, held: int) -> bool:
        return any(
            settled.versions.get(model, held + 1) <= held
            and all(settled.frontiers.get(life, 0) >= frontier for life, frontier in self._marked.values())
            for settled in list(self._heard.values())
        )

    def heard(self, settled: Settled) -> None:
        """Wake the loop for news only: a trainer hears itself too, and whenever it wakes it announces again."""
        if self._heard.get(settled.trainer) != settled:
            self._heard[settled.trainer] = settled
            self._training.new_data()

    def settle(self) -> None:
        """Publish what was learned from the windows, and let the bodies continue, even one in its first window."""
        if self._at_end():
            self._settled_through = dict(self._marked.values())
            if self._training.updates > self._published:
                self._published = self._training.updates
                self._publish()
        self._say_settled(self._settled_through)
