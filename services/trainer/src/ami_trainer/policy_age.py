"""How old a policy was when it acted: how often it has learned since, in this process and in those before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ami_shared.wire import Array


class PolicyAge:
    """Relates the versions that are noted in records to how often the policy has learned.

    Several versions may be published of what one rollout taught. `versions` are those of a rollout's records,
    (length + 1,) int64: the last record begins the next rollout.

    Attributes:
        learnings: how often the policy has learned.
    """

    def __init__(self, max_lag: int, digest: Callable[[], str]) -> None:
        """Start with a policy that has learned nothing, and has not been published.

        Args:
            max_lag: a rollout is stale if the policy has learned more often than this since it acted in the oldest
                record.
            digest: returns a digest of the policy's present parameters.
        """
        self._max_lag, self._digest = max_lag, digest
        self.learnings = 0
        self._published: deque[tuple[int, int]] = deque()  # version, and how often the policy had learned before
        self._first_version = self._newest_version = 0  # of those that this process published
        self._restored_version = 0  # the last that an earlier process had published when it was saved
        self._saved_as = ""  # digest of the parameters at that time; empty if nothing was restored
        self._learned_since_save = False

    def learn(self) -> None:
        """Note that the policy begins to learn from rollouts."""
        self.learnings += 1

    def publish(self, version: int) -> None:
        """Note that the present parameters have been published."""
        self._newest_version = version
        if not self._first_version:
            self._first_version = version
            went_on = version - 1 > self._restored_version
            self._learned_since_save = bool(self._saved_as) and went_on and self._saved_as != self._digest()
        if not self._published or self._published[-1][1] < self.learnings:
            self._published.append((version, self.learnings))
        while len(self._published) > 1 and self.learnings - self._published[1][1] > self._max_lag:
            self._published.popleft()

    def is_stale(self, versions: Array) -> bool:
        """Return whether a rollout is of too old a policy, or was learned from by an earlier process after its save.

        Of the latter the parameters that this process began with tell: they were published after all that went before.
        Where they are those of the save itself, a run has been taken back to it, and nothing was learned since.
        """
        after = -1 if self._learned_since_save else self._restored_version
        learned_before = after < versions[:-1].max() < self._first_version - 1
        return self.lag(int(versions.min())) > self._max_lag or bool(learned_before)

    def mean_lag(self, rollouts: Sequence[Array]) -> float:
        """Return how often the policy has learned since it acted in the steps of these rollouts, on average."""
        versions = [versions[:-1] for versions in rollouts]
        acted, steps = np.unique(np.concatenate(versions) if versions else [], return_counts=True)
        return float(np.average([self.lag(int(version)) for version in acted], weights=steps)) if len(acted) else 0.0

    def lag(self, version: int) -> int:
        """Return how often the policy has learned since this version of it.

        Versions that an earlier process published after its save count as learned once: the true number is unknown.
        """
        known = [learned for published, learned in self._published if published <= version]
        oldest = self._published[0][1] if self._published else self.learnings
        unknown = self._restored_version < version < self._first_version
        return self.learnings - (known[-1] if known else oldest) + unknown

    def state(self) -> dict[str, Any]:
        """Return what restore() needs, besides `learnings`."""
        return {
            "published": [list(entry) for entry in self._published],
            "newest_version": self._newest_version,
            "parameters": self._digest(),
        }

    def restore(self, state: Mapping[str, Any], learnings: int) -> None:
        """Continue from state() of an earlier process, whose policy had learned so often."""
        self.learnings = learnings
        published = ((int(version), int(learned)) for version, learned in state.get("published", []))
        self._published = deque(entry for entry in published if entry[1] <= learnings)
        newest = state.get("newest_version", self._published[-1][0] if self._published else 0)
        self._newest_version = self._restored_version = int(newest)
        self._saved_as = str(state.get("parameters", ""))
