"""When a batch is full or old enough to be sent. No clock and no socket of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """Collects items until there are `count` of them, they have `nbytes` bytes, or the oldest is `age_s` old."""

    def __init__(self, count: int, age_s: float, nbytes: int, size_of: Callable[[T], int]) -> None:
        self._count, self._age_s = count, age_s
        self._nbytes, self._size_of = nbytes, size_of
        self._items: list[T] = []
        self._collected_bytes = 0
        self._since = 0.0

    def add(self, item: T, now: float) -> list[T] | None:
        """Add an item; return the batch if it is full now."""
        nbytes = self._size_of(item)
        if not self._items:
            self._since = now
        self._items.append(item)
        self._collected_bytes += nbytes
        full = len(self._items) >= self._count or self._collected_bytes >= self._nbytes
        return self.flush() if full else None

    def take_aged(self, now: float) -> list[T] | None:
        """Return the batch if its oldest item has reached the maximum age."""
        return self.flush() if self._items and now - self._since >= self._age_s else None

    def due_in(self, now: float) -> float | None:
        """Seconds until the batch has to be sent; None while it is empty."""
        return max(0.0, self._since + self._age_s - now) if self._items else None

    def flush(self) -> list[T] | None:
        """Return the items collected so far, if any."""
        items, self._items, self._collected_bytes = self._items, [], 0
        return items or None
