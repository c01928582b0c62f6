"""Which checkpoints are kept: the newest ones, hourly, daily and weekly ones, and those that operators named. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ami_controller.checkpoint_files import Manifest, newest_first

HOUR_S, DAY_S, WEEK_S = 3_600.0, 86_400.0, 604_800.0


@dataclass(frozen=True)
class Retention:
    """How many of each are kept: the newest, and the newest of each of the last hours, days and weeks that have any.

    A checkpoint that an operator named is kept in addition, until an operator removes it.
    """

    newest: int = 3
    hourly: int = 24
    daily: int = 7
    weekly: int = 8

    def superfluous(self, manifests: Sequence[Manifest]) -> list[str]:
        """Return the names of the checkpoints that need not be kept, oldest first; never the newest."""
        ordered = newest_first(manifests)
        kept = {manifest.name for manifest in ordered[: max(1, self.newest)]}
        kept |= {manifest.name for manifest in ordered if manifest.about.get("named")}
        for length_s, count in ((HOUR_S, self.hourly), (DAY_S, self.daily), (WEEK_S, self.weekly)):
            newest_of: dict[int, str] = {}
            for manifest in ordered:
                newest_of.setdefault(int(manifest.created // length_s), manifest.name)
            kept |= set(list(newest_of.values())[:count])
        return [manifest.name for manifest in reversed(ordered) if manifest.name not in kept]
