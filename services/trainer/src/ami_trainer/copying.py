"""A copy of a model's parameters, with a concurrent check that every number is finite.

Training waits only for the copy. Another thread follows with the check, while the copied data is still in the
processor's caches: on a separate core this delays neither.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import nn

from ami_shared.models.parameters import copy_state, is_finite
from ami_shared.wire import Array

FOLLOWED_BYTES = 8 << 20  # copied between two notifications of the checking thread; smaller models are checked after


class Copying:
    """A copy that is made by one thread, and checked by another."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """Prepare a copy into given arrays.

        Args:
            arrays: name → array to be filled, in the order of the model's state.
        """
        self.arrays = arrays
        self._copied = 0
        self._changed = threading.Condition()
        self._finite: bool | None = None

    @property
    def worth_following(self) -> bool:
        """Whether the copy takes longer than waking a thread."""
        return sum(array.nbytes for array in self.arrays.values()) > FOLLOWED_BYTES

    def make(self, module: nn.Module) -> None:
        """Copy a module's state. Called between two gradient steps."""
        copied = untold_bytes = 0

        def follow(array: Array) -> None:
            nonlocal copied, untold_bytes
            copied, untold_bytes = copied + 1, untold_bytes + array.nbytes
            if untold_bytes >= FOLLOWED_BYTES:
                self._tell(copied)
                untold_bytes = 0

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
            self._finite = all(self._see(n, array) for n, array in enumerate(self.arrays.values()))
        return self._finite

    def _see(self, n: int, array: Array) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._copied > n)
        return is_finite(array)
