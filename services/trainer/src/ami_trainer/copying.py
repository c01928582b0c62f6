"""One copy of a model's parameters, and the look at every number of it, which follows right behind.

The copy is what training waits for. Whether all is finite another thread sees meanwhile, while the processor's caches
still hold what was copied: on a core of its own that costs neither of them time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import nn

from ami_shared.models.parameters import copy_state, is_finite
from ami_shared.wire import Array

FOLLOWED_BYTES = 8 << 20  # copied between two words to whoever follows; what is smaller is looked at afterwards


class Copying:
    """A copy to be made by one thread, and looked at by another."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """Prepare a copy into given arrays.

        Args:
            arrays: to be filled, in the order of the model's state.
        """
        self.arrays = arrays
        self._copied = 0
        self._changed = threading.Condition()
        self._finite: bool | None = None

    @property
    def worth_following(self) -> bool:
        """Whether the copy takes longer than it takes to wake a thread."""
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
        """Return whether all numbers are finite; wait for those that are not copied yet. Always from one thread."""
        if self._finite is None:
            self._finite = all(self._see(n, array) for n, array in enumerate(self.arrays.values()))
        return self._finite

    def _see(self, n: int, array: Array) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._copied > n)
        return is_finite(array)
