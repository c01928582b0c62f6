"""Trainers and buffers that go on from a checkpoint's files do what they would have done without an interruption."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pytest
import torch
from experience import batches, record
from hypothesis import given
from hypothesis import strategies as st
from learning import batch_of, numbered, tiny_trainer

from ami_shared.errors import WireError
from ami_shared.models.policy_value import PolicyValueCommonNet, Trunk, VectorTrunk
from ami_shared.records import RecordBatch
from ami_shared.state import copied, from_files, to_files
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.buffers.rollout import RolloutBuffer
from ami_trainer.buffers.time_series import TimeSeriesBuffer
from ami_trainer.optimisation import GuardedOptimiser
from ami_trainer.service import restore_torch_random_state, torch_random_state
from ami_trainer.trainers.image_vae import ImageVAETrainer
from ami_trainer.trainers.ppo import PPOTrainer

COLUMNS = ("observation", "action", "log_prob", "value", "reward", "rewarded")


class Keeps(Protocol):
    def state(self) -> Any: ...


def through_files(component: Keeps) -> dict[str, Any]:
    """Return a component's state as it comes back from a checkpoint's files."""
    files = to_files("x", copied(component.state()))
    return from_files("x", {file.path: file.read(0, 1 << 30) for file in files})


def frames(first: int, count: int) -> np.ndarray[Any, Any]:
    numbers = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(numbers[:, None, None, None], (count, 3, 4, 4)).copy()


@given(seen=st.integers(0, 40), more=st.integers(1, 20))
def test_a_random_buffer_goes_on_as_if_nothing_had_been(seen: int, more: int) -> None:
    straight = RandomImageBuffer(16, 4, 4, seed=3, fresh_capacity=8)
    straight.add(frames(0, seen))
    again = RandomImageBuffer(16, 4, 4, seed=9, fresh_capacity=8)
    again.restore(through_files(straight))
    for buffer in (straight, again):
        buffer.add(frames(seen, more))
    np.testing.assert_array_equal(straight.take_fresh(), again.take_fresh())
    np.testing.assert_array_equal(straight.sample(20), again.sample(20))
    assert straight.statistics() == again.statistics()


@pytest.mark.parametrize("capacity", [4, 64])
def test_a_random_buffer_of_another_size_takes_what_it_can(capacity: int) -> None:
    first = RandomImageBuffer(16, 4, 4, fresh_capacity=8)
    first.add(frames(0, 12))
    first.take_fresh()
    other = RandomImageBuffer(capacity, 4, 4, fresh_capacity=8)
    other.restore(through_files(first))
    assert len(other) == min(capacity, 12)
    assert set(other.sample(50)[:, 0, 0, 0]) <= set(range(12))
    assert other.seen == 12


def test_a_state_of_when_fresh_frames_were_drawn_at_once_holds_each_frame_once() -> None:
    first = RandomImageBuffer(16, 4, 4, fresh_capacity=8)
    first.add(frames(0, 6))
    state = first.state()
    again = RandomImageBuffer(16, 4, 4, fresh_capacity=8)
    again.restore({**state, "frames": frames(0, 6)})
    assert (len(again), again.seen, len(again.take_fresh())) == (6, 6, 0)


def test_frames_of_another_size_are_a_misfit() -> None:
    with pytest.raises(WireError, match="do not fit"):
        RandomImageBuffer(16, 5, 5).restore(through_files(RandomImageBuffer(16, 4, 4)))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), kept=st.integers(1, 12), capacity=st.integers(1, 14)
)
def test_a_time_series_goes_on_whatever_its_new_capacity(lengths: list[int], kept: int, capacity: int) -> None:
    straight, n = TimeSeriesBuffer(kept, ["number"]), 0
    for turn, length in enumerate(lengths):
        straight.add(numbered(length, n, life=f"life {turn}"), continues=False)
        n += length
    again = TimeSeriesBuffer(capacity, ["number"])
    again.restore(through_files(straight))
    again.add(numbered(3, n, life=f"life {len(lengths) - 1}"), continues=True)
    windows = again.newest(1)
    assert windows is not None
    assert windows["number"][0, 0, 0] == n + 2
    assert len(again) == min(capacity, min(kept, n) + 3)
    for length in range(1, capacity + 1):
        if again.windows(length):
            sampled = again.sample(30, length)["number"][..., 0]
            assert (np.diff(sampled, axis=1) == 1).all(), "windows are of records in order"
            assert sampled.min() >= max(0, n - kept)
            border = n - lengths[-1]
            assert not ((sampled[:, 0] < border) & (sampled[:, -1] >= border)).any(), "no window crosses a border"


def test_a_time_series_of_the_same_capacity_samples_the_same() -> None:
    straight, again = TimeSeriesBuffer(10, ["number"], seed=1), TimeSeriesBuffer(10, ["number"], seed=2)
    straight.add(numbered(25), continues=True)
    straight.take_fresh(2, 3)
    again.restore(through_files(straight))
    for buffer in (straight, again):
        buffer.add(numbered(4, 25), continues=True)
    np.testing.assert_array_equal(straight.sample(20, 3)["number"], again.sample(20, 3)["number"])
    one, other = straight.take_fresh(2, 3), again.take_fresh(2, 3)
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one["number"], other["number"])


def rollouts(length: int = 4) -> RolloutBuffer:
    buffer = RolloutBuffer(length)
    buffer.require(COLUMNS)
    return buffer


def test_rollouts_go_on_in_the_middle_of_one() -> None:
    straight, again = rollouts(), rollouts()
    first, second = batches([record(n) for n in range(14)], cuts=[7])
    straight.add(first, True, "policy_value")
    again.restore(through_files(straight))
    for buffer in (straight, again):
        buffer.add(second, True, "policy_value")
    for _ in range(2):
        (one,), (other,) = straight.take(), again.take()
        np.testing.assert_array_equal(one.columns["reward"], other.columns["reward"])
        np.testing.assert_array_equal(one.follows, other.follows)
        np.testing.assert_array_equal(one.versions, other.versions)
    assert straight.statistics() == again.statistics()


def test_rollouts_of_another_length_begin_anew_and_go_on_counting() -> None:
    straight, longer = rollouts(), rollouts(6)
    straight.add(batches([record(n) for n in range(9)])[0], True, "policy_value")
    longer.restore(through_files(straight))
    assert (longer.ready(), longer.records) == (False, 9)


@pytest.mark.parametrize("choices", [(1,), (3, 2)], ids=["fewer", "more dimensions"])
def test_actions_that_there_are_not_any_more_are_a_misfit(choices: tuple[int, ...]) -> None:
    kept, now = rollouts(), RolloutBuffer(4)
    now.require(COLUMNS, choices=choices)
    lived = batches([record(n, action=np.array([int(n == 2)])) for n in range(9)])[0]
    kept.add(lived, True, "policy_value")
    with pytest.raises(WireError, match="action"):
        now.restore(through_files(kept))
    straight = TimeSeriesBuffer(10, ["action"])
    straight.add(lived, continues=True)
    other = TimeSeriesBuffer(10, ["action"], choices=choices)
    with pytest.raises(WireError, match="action"):
        other.restore(through_files(straight))
    with pytest.raises(WireError, match="action"):
        other.add(lived, continues=True)
    assert len(other) == 0


def parameters(trainer: ImageVAETrainer | PPOTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for model in trainer.published_models.values() for p in model.state_dict().values()]


def test_an_encoders_trainer_takes_the_same_steps_after_a_restore() -> None:
    straight, again = tiny_trainer(), tiny_trainer()
    straight.consume(batch_of(20), continues=False)
    for _ in range(2):
        list(straight.train())
    state, random = through_files(straight), copied(torch_random_state())
    for name, model in straight.published_models.items():
        again.published_models[name].load_state_dict(model.state_dict())
    again.restore(state)
    assert again.picture() is not None, "a picture, whenever it is made, changes nothing"
    told = []
    for trainer in (straight, again):
        restore_torch_random_state(random)
        trainer.consume(batch_of(6, first=20), continues=True)
        told.append([metrics["loss"] for metrics in trainer.train()])
    assert told[0] == told[1]
    for one, other in zip(parameters(straight), parameters(again), strict=True):
        assert torch.equal(one, other)
    assert straight.updates == again.updates == 15


def policy_trainer() -> PPOTrainer:
    torch.manual_seed(0)
    policy = PolicyValueCommonNet(VectorTrunk(2, 8), (3,))
    return PPOTrainer(policy, rollout_length=8, batch_size=4, seed=5)


def test_a_policys_trainer_takes_the_same_steps_after_a_restore() -> None:
    straight, again = policy_trainer(), policy_trainer()
    first, second = batches([record(n) for n in range(20)], cuts=[12])
    straight.consume(first, False)
    list(straight.train())
    state = through_files(straight)
    again.published_models["policy_value"].load_state_dict(straight.published_models["policy_value"].state_dict())
    again.restore(state)
    for trainer in (straight, again):
        trainer.consume(second, True)
        assert trainer.is_trainable()
        list(trainer.train())
    for one, other in zip(parameters(straight), parameters(again), strict=True):
        assert torch.equal(one, other)
    assert (straight.used, straight.updates) == (again.used, again.updates)


class PlainTrunk(Trunk):
    """As in docs/extending.md: it does not say what form its input has."""

    inputs = ("observation",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.features, self.layer = 4, torch.nn.Linear(size, 4)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer(observation)
        return features


def test_records_for_another_model_do_not_say_what_form_new_ones_have() -> None:
    def trainer(size: int) -> PPOTrainer:
        return PPOTrainer(PolicyValueCommonNet(PlainTrunk(size), (3,)), rollout_length=8, batch_size=4)

    def records(size: int, count: int) -> RecordBatch:
        (batch,) = batches([record(n, observation=np.zeros(size, np.float32)) for n in range(count)])
        return batch

    before, after = trainer(2), trainer(3)
    before.consume(records(2, 13), False)
    list(before.train())
    with pytest.raises(WireError, match="does not fit"):
        after.restore(through_files(before))
    limiter = after.statistics()["limiter"]
    assert (limiter["used"], limiter["overflowed"]) == (8, 4), "those that waited"
    after.consume(records(3, 13), False)
    assert after.is_trainable()
    assert after.statistics()["buffer"]["seen"] == 26


def test_moments_of_another_layout_are_a_misfit_and_change_nothing() -> None:
    def optimiser(width: int) -> GuardedOptimiser:
        module = torch.nn.Linear(3, width)
        guarded = GuardedOptimiser({"linear": module}, torch.optim.Adam(module.parameters()))
        guarded.step_on((), lambda _: {"loss": module(torch.ones(2, 3)).sum()})
        return guarded

    wide, narrow = optimiser(5), optimiser(2)
    before = through_files(narrow)
    with pytest.raises(WireError, match="does not fit"):
        narrow.restore(through_files(wide))
    after = through_files(narrow)
    np.testing.assert_array_equal(before["moments"]["0"]["exp_avg"], after["moments"]["0"]["exp_avg"])


def test_what_fits_is_restored_where_something_else_does_not() -> None:
    trainer = tiny_trainer()
    trainer.consume(batch_of(20), continues=False)
    list(trainer.train())
    state = through_files(trainer)
    state["buffer"]["frames"] = state["buffer"]["frames"][:, :, :5]
    again = tiny_trainer()
    with pytest.raises(WireError, match="buffer: frames"):
        again.restore(state)
    assert again.updates == trainer.updates
    assert again.statistics()["limiter"] == trainer.statistics()["limiter"]
