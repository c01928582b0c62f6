"""The slow proof: three minutes in the simulated world, and the agent sees."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import pytest
from processes import System

pytestmark = pytest.mark.slow


def test_after_three_minutes_the_error_on_fresh_frames_is_under_a_third(make_system: Callable[..., System]) -> None:
    system = make_system("models=small", "tracker.metrics_interval=1", "trainers.image_vae.service.picture_interval=60")
    system.start("up")
    system.wait_running()
    time.sleep(180)
    assert system.ami("shutdown").returncode == 0
    points = [json.loads(line) for line in (system.run_dir / "metrics.jsonl").read_text().splitlines()]
    errors = [p["value"] for p in points if p["name"] == "image_vae/fresh_reconstruction_error"]
    first, last = errors[0], statistics.median(errors[-15:])
    late = [p["value"] for p in points if p["name"] == "body/late_ticks"][-1]
    print(f"\nerror on fresh frames: {first:.4f} → {last:.4f}, {last / first:.2f} of the first; {late:.0f} late ticks")
    print(f"pictures: {sorted((system.run_dir / 'pictures').glob('*.png'))}")
    assert last < first / 3
    assert list((system.run_dir / "pictures").glob("*.png"))
