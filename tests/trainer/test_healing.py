"""A body's ring and a trainer's frontier against each other, over a wire that drops, with any seed: nothing is lost
while the ring holds it, and nothing comes twice."""

from __future__ import annotations

import numpy as np
import pytest
from learning import numbered

from ami_inference.retained import Retained, SentBatch
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
                stream.arrived(batch, live=True)
        cut &= turn < 300
        if turn % 10 == 0 and not cut:
            stream.told(Extent("body", "a", retained.range))
        if not cut and (wish := stream.wish(now)):
            answer = retained.answer(wish[1], at_most_bytes=20_000, at_most_batches=8)
            for sent in answer.batches:
                if turn > 300 or random.random() < 0.9:
                    first, end = sent.range
                    stream.arrived(numbered(end - first, first=first), live=False)
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
