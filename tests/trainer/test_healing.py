"""A body's ring and a trainer's frontier against each other, over a wire that drops, with any seed: nothing is lost
while the ring holds it, and nothing comes twice."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from learning import numbered

from ami_inference.retained import Retained, SentBatch
from ami_shared import limits
from ami_shared.experience import Extent, Fetched
from ami_trainer.frontier import BodyStream


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("ring", "loses"), [(1 << 30, False), (40_000, True)])
def test_a_wire_that_drops_is_healed(seed: int, ring: int, loses: bool) -> None:
    random = np.random.default_rng(seed)
    stream, retained = BodyStream(history=1 << 40), Retained(ring)
    published, numbers, now, cut = 0, [], 0.0, False
    for turn in range(400):
        now += 0.05
        if turn < 300:
            count = int(random.integers(1, 17))
            batch = numbered(count, first=published)
            published += count
            retained.add(SentBatch((batch.first_sequence, batch.end), (bytes(batch.nbytes),), position=0), gone=0)
            cut = random.random() < 0.1 if not cut else random.random() < 0.9
            if not cut and (published == count or random.random() < 0.8):
                stream.arrived(batch, True, now)
        cut &= turn < 300
        if turn % 10 == 0 and not cut:
            stream.told(Extent("body", "a", retained.range), now)
        if not cut and (wish := stream.wish(now)):
            answer = retained.answer(wish[1], at_most_bytes=20_000, at_most_batches=8)
            for sent in answer.batches:
                if turn > 300 or random.random() < 0.9:
                    first, end = sent.range
                    stream.arrived(numbered(end - first, first=first), False, now)
            if turn > 300 or random.random() < 0.9:
                stream.answered(Fetched("body", "a", answer.range, answer.gone), now)
        while item := stream.take():
            numbers += range(item[0].first_sequence, item[0].end)
    assert numbers == sorted(set(numbers))
    assert stream.counters.received == len(numbers)
    assert stream.life is not None
    assert stream.life.behind == 0
    assert len(numbers) + stream.counters.lost == published
    assert (stream.counters.lost > 0) == loses


@pytest.mark.parametrize(
    ("bytes_s", "batch_bytes", "batches"), [(1e6, 100_000, 300), (4e6, 1_000_000, 150), (2e6, 4_000_000, 40)]
)
def test_on_a_slow_line_what_is_missed_comes_once(bytes_s: float, batch_bytes: int, batches: int) -> None:
    """A line with a queue that drops what is too much; an answer of many megabytes takes it many seconds."""
    stream, retained, step_s, now = BodyStream(history=1 << 40), Retained(1 << 40), 0.05, 0.0
    for n in range(batches):
        retained.add(SentBatch((n, n + 1), (memoryview(bytes(1)),) * 1, position=0), gone=0)
    line: deque[tuple[float, Fetched | int]] = deque()
    arrived_bytes = sent_bytes = 0.0
    stream.told(Extent("body", "a", retained.range), now)
    taken = 0
    while taken < batches:
        now += step_s
        assert now < 1.5 * batches * batch_bytes / bytes_s + 10, f"{taken} of {batches}"
        if wish := stream.wish(now):
            at_once = min(limits.FETCH_BATCHES, max(1, limits.FETCH_BYTES // batch_bytes))
            answer = retained.answer(wish[1], at_most_bytes=1 << 40, at_most_batches=at_once)
            for part in (*(sent.range[0] for sent in answer.batches), Fetched("body", "a", answer.range, answer.gone)):
                if len(line) < limits.EXPERIENCE_QUEUE:
                    line.append((batch_bytes if isinstance(part, int) else 100.0, part))
        arrived_bytes += bytes_s * step_s
        while line and arrived_bytes >= line[0][0]:
            nbytes, part = line.popleft()
            arrived_bytes -= nbytes
            sent_bytes += nbytes
            if isinstance(part, int):
                stream.arrived(numbered(1, first=part), False, now)
            else:
                stream.answered(part, now)
        arrived_bytes = arrived_bytes if line else 0.0
        while stream.take():
            taken += 1
    assert stream.counters.duplicates <= 0.1 * batches
