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
        """How many records from before this trainer joined are useful, e.g. as many as the buffer holds."""
        ...

    def follow(self, replicas: Replicas) -> None:
        """Take the replicas of the followed models; the trainer calls swap() between two gradient steps."""
        ...

    def published(self, versions: Mapping[str, int]) -> None:
        """Note the versions under which the present models have just been published."""
        ...

    def in_lockstep(self) -> None:
        """Note that bodies will wait for this trainer: it must not drop any of their records for lack of time."""
        ...

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        """Take new records into the buffer; called in the feeder's thread.

        Args:
            batch: the records of one body.
            continues: whether they follow the body's last ones without a gap.

        Raises:
            WireError: the records lack what this trainer needs.
        """
        ...

    def is_trainable(self) -> bool:
        """Return whether train() would take at least one gradient step now."""
        ...

    def train(self) -> Iterator[Mapping[str, float]]:
        """Train for a while; yield the metrics of each gradient step right after it."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what restore() needs besides the published models, as a tree of ami_shared.state.

        Called between two gradient steps, while nothing is consumed; arrays may be views of data that changes later.
        """
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier process, before anything is consumed.

        Raises:
            WireError: the state does not fit this trainer.
        """
        ...

    def picture(self) -> Picture | None:
        """Return an image that shows what has been learned so far, if there is one."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows: buffer, gradient steps, losses."""
        ...


class PlainTrainer:
    """Base class of trainers that learn from records alone, and draw nothing."""

    @property
    def followed_models(self) -> Mapping[str, nn.Module]:
        return {}

    def follow(self, replicas: Replicas) -> None:
        """Do nothing: no other model is needed."""

    def published(self, versions: Mapping[str, int]) -> None:
        """Do nothing: the versions do not matter."""

    def in_lockstep(self) -> None:
        """Do nothing: no record is dropped for lack of time anyway."""

    def picture(self) -> Picture | None:
        return None
