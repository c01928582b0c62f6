"""What a trainer does by itself is what its configuration says."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from omegaconf import OmegaConf

import ami_trainer.service as service
import ami_trainer.trainers as trainers
from ami_shared.config import load_config
from ami_shared.errors import ConfigurationError

FEATURES = ("image_vae", "inverse_dynamics", "random_features")


@pytest.mark.parametrize(
    ("cores", "trainers", "threads"), [(1, 1, 1), (2, 3, 1), (8, 3, 2), (16, 3, 5), (16, 1, 15), (2, 0, 1)]
)
def test_the_trainers_of_an_experiment_share_the_cores(
    cores: int, trainers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "usable_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert service.threads_for(None, trainers) == threads
    assert service.threads_for(7, trainers) == 7


@pytest.mark.parametrize("name", ["forward_dynamics", "ppo", *FEATURES])
def test_the_defaults_of_a_trainer_are_those_of_its_configuration(name: str) -> None:
    features = name if name in FEATURES else "image_vae"
    section: Any = OmegaConf.to_container(load_config([f"features={features}"]).trainers[name])
    parameters = inspect.signature(getattr(trainers, section["_target_"].rpartition(".")[2])).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    configured = {key: value for key, value in section.items() if not isinstance(value, dict) and key != "_target_"}
    assert configured == {key: defaults[key] for key in configured}


@pytest.mark.parametrize(
    ("trainer", "wrong"),
    [("ppo", "epochs=0"), ("image_vae", "batch_size=1"), ("forward_dynamics", "updates_per_record=-1")],
)
def test_an_error_of_the_configuration_names_the_trainer_whose_it_is(trainer: str, wrong: str) -> None:
    config = load_config([f"trainer={trainer}", "models=tiny", f"trainers.{trainer}.{wrong}"])
    with pytest.raises(ConfigurationError, match=rf"^trainers\.{trainer}\.{wrong}\D"):
        service.build_trainer(config, team=None)
