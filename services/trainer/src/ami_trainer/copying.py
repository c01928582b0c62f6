"""A copy of a model's parameters, with a concurrent check that every number is finite.

Training waits only for the copy. Another thread follows with the check, while the copied data is still in the
processor's caches: on a separate core this delays neither.
"""

from __future__ import annotations

import threading

from torch import nn

from ami_shared.models.parameters import copy_state, is_finite
from ami_shared.snapshots import Layout
from ami_shared.wire import Array

FOLLOWED_BYTES = 8 << 20  # copied between two notifications of the checking thread; smaller models are checked after


class Copying:
    """A copy that is made by one thread, and checked by another.

    Attributes:
        arrays: name → array to be filled.
        worth_following: whether the copy takes longer than waking a thread.
    """

    def __init__(self, layout: Layout, content: Array) -> None:
        """Prepare a copy.

        Args:
            layout: of the model's state.
            content: memory for it, (nbytes,) uint8.
        """
        self.arrays = layout.arrays(content)
        self.worth_following = layout.nbytes > FOLLOWED_BYTES
        self._stretches = layout.stretches(content, FOLLOWED_BYTES)
        self._copied = 0
        self._changed = threading.Condition()
        self._finite: bool | None = None

    def make(self, module: nn.Module) -> None:
        """Copy a module's state. Called between two gradient steps."""
        copied, ends = 0, {count for count, _ in self._stretches}

        def follow() -> None:
            nonlocal copied
            copied += 1
            if copied in ends:
                self._tell(copied)

        try:
            copy_state(module, self.arrays, follow)
        finally:
            self._tell(len(self.arrays))

    def _tell(self, copied: int) -> None:
        with self._changed:
            self._copied = copied
            self._changed.notify_all()

    def finite(self) -> bool:
        """Return whether all numbers are finite; wait for those not copied yet. Only ever from one thread."""
        if self._finite is None:
            self._finite = all(self._see(count, numbers) for count, numbers in self._stretches)
        return self._finite

    def _see(self, count: int, numbers: Array) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._copied >= count)
        return is_finite(numbers)
