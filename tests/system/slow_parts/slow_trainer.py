"""A trainer that takes in ten records a second."""

from __future__ import annotations

import time

from ami_shared.records import RecordBatch
from ami_trainer.trainers import ImageVAETrainer


class SlowTrainer(ImageVAETrainer):
    def consume(self, batch: RecordBatch, continues: bool) -> None:
        for _ in range(len(batch)):
            time.sleep(0.1)
        super().consume(batch, continues)
