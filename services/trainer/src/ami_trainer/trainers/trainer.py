"""What the training service expects of a trainer: it knows nothing of sockets, pauses or publishing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from ami_shared.metrics import Picture
from ami_shared.models.replicas import Replicas
from ami_shared.records import RecordBatch


class Trainer(Protocol):
    """Learns from records, one gradient step at a time."""

    @property
    def published_models(self) -> Mapping[str, nn.Module]:
        """The models that replicas follow, by name."""
        ...

    @property
    def followed_models(self) -> Mapping[str, nn.Module]:
        """The models of other trainers that this one needs, by name; filled from their snapshots."""
        ...

    @property
    def history(self) -> int:
        """How many records of a body's life before this trainer began are of use, e.g. as many as the buffer holds."""
        ...

    def follow(self, replicas: Replicas) -> None:
        """Take the replicas of the followed models; swap() between two gradient steps is up to the trainer."""
        ...

    def published(self, versions: Mapping[str, int]) -> None:
        """Take note of the versions under which the models have just been published, as they were then."""
        ...

    def in_lockstep(self) -> None:
        """Bodies are going to wait for this trainer: nothing that they bring may be given up for lack of time."""
        ...

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        """Take new records into the buffer; called in the intake's thread.

        Args:
            continues: whether the batch follows the body's last one without a gap.

        Raises:
            WireError: the records do not have what this trainer needs.
        """
        ...

    def is_trainable(self) -> bool:
        """Whether train() would take at least one gradient step now."""
        ...

    def train(self) -> Iterator[Mapping[str, float]]:
        """Train for a while: yields the metrics of each gradient step right after it."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return all that restore() needs besides the published models, as ami_shared.state keeps it.

        Called between two gradient steps, while nothing is consumed; arrays may be views of what goes on changing.
        """
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier process, before anything is consumed.

        Raises:
            WireError: it does not fit this trainer.
        """
        ...

    def picture(self) -> Picture | None:
        """Return an image that shows what has been learned so far."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows: buffer, gradient steps, losses."""
        ...


class PlainTrainer:
    """The answers of a Trainer that learns from records alone, and draws nothing."""

    @property
    def followed_models(self) -> Mapping[str, nn.Module]:
        return {}

    def follow(self, replicas: Replicas) -> None:
        """No other model is needed."""

    def published(self, versions: Mapping[str, int]) -> None:
        """Records teach the same whatever version they were made with."""

    def in_lockstep(self) -> None:
        """Nothing is given up for lack of time in any case."""

    def picture(self) -> Picture | None:
        return None
