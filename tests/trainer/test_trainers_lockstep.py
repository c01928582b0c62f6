"""The trainers' side of lockstep: when they learn, and when they say that they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from ami_shared.settled import Settled
from ami_trainer.lockstep import Lockstep

WINDOW, END, NEXT_END = 128, 129, 257  # the record behind a window tells what its last step was worth


class Scene:
    """A lockstep of a trainer that follows one model, and what it said."""

    def __init__(self) -> None:
        self.updates = self.woken = self.published = 0
        self.present: dict[str, tuple[str, int]] = {}
        self.versions = {"image_encoder": 2}
        self.said: list[Mapping[str, int]] = []
        parts: Any = (self, self, self)
        self.lockstep = Lockstep(WINDOW, *parts, self.publish, self.said.append)

    def new_data(self) -> None:
        self.woken += 1

    def newest_versions(self) -> Mapping[str, int]:
        return self.versions

    def publish(self) -> None:
        self.published += 1

    def hears(self, through: int, version: int) -> None:
        self.lockstep.heard(Settled("image_vae", {"life": through}, {"image_encoder": version}))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_notice_that_tells_nothing_new_wakes_nobody(scene: Scene) -> None:
    """Otherwise a trainer that hears itself settle would settle again, as fast as the wire goes."""
    notice = Settled("forward_dynamics", {"life": END}, {"forward_dynamics": 3})
    for heard in (notice, replace(notice), replace(notice, versions={"forward_dynamics": 4})):
        scene.lockstep.heard(heard)
    assert scene.woken == 2


@pytest.mark.parametrize(
    ("consumed", "through", "version", "may"),
    [
        (END, END, 2, True),
        (END, END, 1, True),  # an older one than is held here: that one's successor has been learned, too
        (END - 1, END, 2, False),  # in the middle of a window
        (END, 0, 2, False),  # the encoder has not learned from it yet
        (END, END, 3, False),  # its newest version is not here yet
    ],
)
def test_it_learns_at_the_end_of_a_window_from_models_that_have(
    scene: Scene, consumed: int, through: int, version: int, may: bool
) -> None:
    scene.present = {"body": ("life", consumed)}
    scene.hears(through, version)
    scene.lockstep.mark()
    assert scene.lockstep.may_train() is may


def test_before_the_model_that_it_follows_has_been_heard_of_it_does_not_learn(scene: Scene) -> None:
    scene.present = {"body": ("life", END)}
    scene.lockstep.mark()
    assert not scene.lockstep.may_train()


def test_it_says_through_where_it_has_learned_behind_what_it_has_published(scene: Scene) -> None:
    scene.present = {"body": ("life", END)}
    scene.hears(END, 2)
    scene.lockstep.mark()
    scene.lockstep.settle()
    assert (scene.published, scene.said) == (0, [{"life": END}]), "nothing was learned"
    scene.present = {"body": ("life", NEXT_END)}
    scene.lockstep.settle()
    assert scene.said[-1] == {"life": END}, "what came after the mark is not meant"
    scene.lockstep.mark()
    scene.lockstep.settle()
    assert scene.said[-1] == {"life": END}, "the encoder has not learned from it yet"
    scene.hears(NEXT_END, 2)
    scene.updates = 12
    scene.lockstep.settle()
    scene.lockstep.settle()
    assert (scene.published, scene.said[-1]) == (1, {"life": NEXT_END})


def test_what_a_body_that_was_let_go_on_has_just_begun_is_not_learned_from(scene: Scene) -> None:
    """The buffer may have its first records before they are told to have been consumed."""
    scene.present = {"body": ("life", END)}
    scene.hears(END, 2)
    scene.lockstep.mark()
    assert scene.lockstep.may_train()
    scene.lockstep.settle()
    scene.lockstep.mark()
    assert not scene.lockstep.may_train()
    scene.lockstep.settle()
    assert scene.said == [{"life": END}] * 2, "who did not hear it hears it again"
    scene.present = {"body": ("life", NEXT_END)}
    scene.hears(NEXT_END, 2)
    scene.lockstep.mark()
    assert scene.lockstep.may_train()
