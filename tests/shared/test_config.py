from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ami_shared.config import agreement, build, config_dir, hub_of, load_config, trainer_service
from ami_shared.errors import AmiError, ConfigurationError, SensorLostError

pytestmark = pytest.mark.usefixtures("configs")

EXPERIMENTS = sorted(p.stem for p in (Path(__file__).parents[2] / "configs" / "experiment").glob("*.yaml"))
SIZES = sorted({p.stem for p in (Path(__file__).parents[2] / "configs" / "models").glob("*.yaml")} - {"vector"})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    config = load_config([f"experiment={experiment}"])
    assert config.name == experiment
    assert config.trainer in config.trainers


@pytest.mark.parametrize("experiment", sorted(set(EXPERIMENTS) - {"cartpole"}))
@pytest.mark.parametrize("models", SIZES)
def test_every_experiment_that_sees_composes_with_every_size(experiment: str, models: str) -> None:
    config = load_config([f"experiment={experiment}", f"models={models}"])
    assert config.trainers.image_vae.encoder == config.models.image_encoder


@pytest.mark.parametrize("experiment", ["doom", "reference", "simulated", "vrchat"])
@pytest.mark.parametrize("features", ["image_vae", "random_features", "inverse_dynamics"])
def test_every_curious_experiment_composes_with_every_kind_of_features(experiment: str, features: str) -> None:
    config = load_config([f"experiment={experiment}", f"features={features}"])
    assert set(config.trainers) == {features, "forward_dynamics", "ppo"}
    assert config.trainer == features
    assert config.trainers[features].encoder == config.models.image_encoder
    assert config.trainers.forward_dynamics.decoder == config.models.image_decoder
    assert (config.models.image_decoder is None) == (features != "image_vae")
    assert trainer_service(config, features).publishes[0] == "image_encoder"


def test_a_hub_may_have_an_address_in_brackets() -> None:
    assert load_config(["hub=[fd00::1]:5550"]).hub == "[fd00::1]:5550"


def test_an_agent_cannot_follow_a_model_that_nobody_learns() -> None:
    with pytest.raises(ConfigurationError, match=r"inference\.agent\.models=.*image_encoder"):
        load_config(["features=random_features", "inference.agent.models=[image_decoder]"])


def test_experiments_have_settings_of_their_own_for_each_kind_of_features() -> None:
    doom = load_config(["experiment=doom", "features=inverse_dynamics"])
    assert doom.trainers.inverse_dynamics.updates_per_record == 0.25
    assert load_config(["experiment=reference"]).trainers.image_vae.batch_size == 8


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("nope=1", "nope"),
        ("+trainers.again=${trainers.image_vae}", "trainers image_vae and again both publish image_encoder"),
        ("inference.nope=1", "inference.nope"),
        ("inference.agent.nope=1", "inference.agent.nope"),
        ("seed=three", "seed=three"),
        ("seed=", "seed="),
        ("seed=${nothing}", "nothing"),
        ("observation.height=84.5", "observation.height"),
        ("observation.height=0", "observation.height"),
        ("observation.width=5000", "observation.width"),
        ("observation=null", "observation"),
        ("inference.interval=-1", "inference.interval"),
        ("inference.interval=nan", "inference.interval"),
        ("inference.interval=inf", "inference.interval"),
        ("inference.interval=soon", "inference.interval"),
        ("inference.name=a/b", "inference.name"),
        ("inference.torch_threads=0", "inference.torch_threads"),
        ("inference.lateness_tolerance=-1", "inference.lateness_tolerance"),
        ("inference.lateness_tolerance=nan", "inference.lateness_tolerance"),
        ("tracker.write_interval=0", "tracker.write_interval"),
        ("tracker.write_interval=inf", "tracker.write_interval"),
        ("tracker.write_interval=1e9", "tracker.write_interval"),
        ("trainers.image_vae.service.priority=high", "service.priority='high'"),
        ("trainers.image_vae.service.priority=realtime", "must be one of normal, nice, idle"),
        ("inference.priority=idle", "inference.priority='idle' must be one of realtime, raised, normal"),
        ("tracker.metrics_interval=-1", "tracker.metrics_interval"),
        ("inference.interval=0.3", "max_silence"),
        ("inference.agent.models=[policy]", "inference.agent.models"),
        ("inference.agent.models=[trunks]", "inference.agent.models"),
        ("inference.agent.models=policy_value", "inference.agent.models"),
        ("inference.agent.models=null", "inference.agent.models"),
        ("inference.agent.models=3", "inference.agent.models"),
        ("inference/reward@inference.agent.reward=nope", "inference/reward/nope"),
        ("inference.name=", "inference.name"),
        ("experiment=nope", "experiment/nope"),
        ("features=nope", "features/nope"),
        ("models=gigantic", "models/gigantic"),
        ("models=vector", "policy_input="),
        ("policy_input=vector", "policy_input="),
        ("policy_input=", "policy_input="),
        ("policy_input=null", "policy_input"),
        ("policy_input=[image]", "policy_input"),
        ("pace=slow", "pace="),
        ("pace=null", "pace"),
        ("lockstep_window=0", "lockstep_window="),
        ("lockstep_window=-128", "lockstep_window="),
        ("lockstep_window=1.5", "lockstep_window"),
        ("action.choices=[]", "action.choices="),
        ("action.choices=[3,0]", "action.choices="),
        ("action.choices=[3,many]", "action.choices"),
        ("action.choices=3", "action.choices"),
        ("run_dir=", "run_dir="),
        ("checkpoint.directory=", "checkpoint.directory="),
        ("tracker.experiment=", "tracker.experiment="),
        ("name=", "name="),
        ("name=../x", "name="),
        ("inference.torch_threads=100000", "inference.torch_threads"),
        ("trainers.image_vae.service.threads=100000", "trainers.image_vae.service.threads="),
        ("inference.interval=1000", "inference.interval="),
        ("inference.interval=nan", "inference.interval="),
        ("trainers={}", "~trainers.NAME"),
        ("trainer.ppo.batch_size=3", "did you mean trainers?"),
        ("expriment=noise", "did you mean experiment?"),
        ("camera=0", "did you mean inference.environment.sensor.camera?"),
        ("+experiment=noise", "write experiment=… without +"),
        ("tracker.uri=abc", "tracker.uri=abc is not an address"),
        ("tracker.uri=C:/mlruns", "tracker.uri=C:/mlruns is not an address"),
        ("inference.retained_mb=99999999999999", "retained_mb must be at most"),
        ("hub=nowhere", "hub="),
        ("hub=http://127.0.0.1:5550", "hub="),
        ("hub=a b:5550", "hub="),
        ("hub=a:b:5550", "hub="),
        ("hub=host:99999", "hub="),
        ("hub=null", "hub"),
        ("hub=???", "hub"),
        ("run_dir=???", "run_dir"),
        ("trainer=nobody", "trainer="),
        ("world=null", "world=null"),
        ("controller.insecure=perhaps", "controller.insecure"),
        ("experiment", "'experiment'"),
        ("seed==3", "seed"),
        ("=3", "=3"),
        ("seed=[1", "seed="),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_key(override: str, named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config([override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_trainer_that_is_not_there_is_told_which_are() -> None:
    with pytest.raises(ConfigurationError, match=r"it has: image_vae"):
        load_config(["trainer=nobody"])


@pytest.mark.parametrize("experiment", ["noise", "vrchat"])
def test_a_key_of_the_world_where_there_is_none_is_a_configuration_error(experiment: str) -> None:
    with pytest.raises(ConfigurationError, match=r"world\.http_port=0.*leave `world\.…` out"):
        load_config([f"experiment={experiment}", "world.http_port=0"])


def test_an_empty_key_file_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_JOIN", "")
    assert hub_of(load_config([]), "body", "body").credentials is None


def test_an_experiment_that_is_not_there_is_told_which_are() -> None:
    with pytest.raises(ConfigurationError, match=r"noise.*simulated.*video.*vrchat"):
        load_config(["experiment=nope"])


def test_the_hub_comes_from_the_environment_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config([]).hub == "127.0.0.1:5550"
    monkeypatch.setenv("AMI_HUB", "example.org:6000")
    assert load_config([]).hub == "example.org:6000"
    assert load_config(["hub=example.org:7000"]).hub == "example.org:7000"


def test_a_bad_hub_in_the_environment_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_HUB", "example.org")
    with pytest.raises(ConfigurationError, match=r"hub=.example.org."):
        load_config([])


def test_the_run_dir_follows_the_experiment() -> None:
    assert load_config(["experiment=noise"]).run_dir == "runs/noise"


def test_the_configuration_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_CONFIG_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"AMI_CONFIG_DIR"):
        config_dir()
    (tmp_path / "config.yaml").touch()
    assert config_dir() == tmp_path.resolve()


@pytest.mark.parametrize(
    "override",
    ["threads=many", "threads=0", "priority=[1]", "publish_interval=0", "publish_interval=nan", "picture_interval=-1",
     "publish_interval=soon", "wire_precision=half"],
)  # fmt: skip
def test_what_is_wrong_about_a_trainer_s_service_names_its_section(override: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^trainers\.image_vae\.service") as caught:
        load_config([f"trainers.image_vae.service.{override}"])
    assert "\n" not in str(caught.value)


def test_a_trainer_s_service_is_that_of_its_section() -> None:
    section = trainer_service(load_config(["trainers.image_vae.service.threads=3"]), "image_vae")
    assert (section.threads, section.priority, section.publish_interval) == (3, "idle", 1.0)


def agreed(*overrides: str) -> dict[str, Any]:
    return agreement(load_config(list(overrides)))


def test_the_agreement_is_flat_and_covers_what_must_be_equal() -> None:
    flat = agreed("seed=4")
    assert flat["seed"] == 4
    assert flat["inference.interval"] == 0.1
    assert flat["models.image_encoder.channels"] == [16, 32, 32]
    assert flat["observation.height"] == 84
    assert {"protocol", "code", "name"} <= set(flat)
    assert not any(isinstance(value, dict) for value in flat.values())


@pytest.mark.parametrize(
    "override",
    ["models=tiny", "seed=1", "observation.height=96", "inference.interval=0.2", "experiment=vrchat",
     "models.image_encoder.hidden=99"],
)  # fmt: skip
def test_the_agreement_differs_where_it_matters(override: str) -> None:
    assert agreed(override) != agreed()


@pytest.mark.parametrize(
    "override",
    ["world.http_port=1234", "world.osc_host=0.0.0.0", "hub=elsewhere:6000", "run_dir=/elsewhere", "inference.name=b",
     "controller.bind=0.0.0.0", "tracker.write_interval=9", "inference.torch_threads=2",
     "trainers.image_vae.device=cuda", "trainers.image_vae.service.priority=nice",
     "models.forward_dynamics.normalised=false", "inference.device=cuda"],
)  # fmt: skip
def test_the_agreement_is_the_same_where_machines_may_differ(override: str) -> None:
    assert agreed(override) == agreed()


def test_a_component_is_built_from_its_section() -> None:
    made = build({"_target_": "fractions.Fraction", "numerator": 1}, "here", denominator=2)
    assert str(made) == "1/2"


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"numerator": 1}, "no _target_"),
        ({"_target_": "fractions.Nope"}, "Nope"),
        ({"_target_": "no_such_module.Nope"}, "no_such_module"),
        ({"_target_": "fractions.Fraction", "nope": 1}, "nope"),
        ({"_target_": "fractions.Fraction", "numerator": "x"}, "Invalid literal"),
    ],
    ids=str,
)
def test_a_component_that_cannot_be_built_is_one_line_that_names_the_section(
    section: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        build(section, "inference.agent")
    assert str(caught.value).startswith("inference.agent")
    assert "\n" not in str(caught.value)


def test_a_component_s_own_configuration_error_is_passed_on() -> None:
    section = {"_target_": "ami_shared.bus.HubAddress.parse", "text": "nowhere"}
    with pytest.raises(ConfigurationError, match=r"^hub='nowhere'"):
        build(section, "somewhere")


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (SensorLostError("no camera"), SensorLostError, "no camera"),
        (MemoryError("2 TiB"), MemoryError, "2 TiB"),
        (OutOfMemoryError("of a GPU"), OutOfMemoryError, "of a GPU"),
        (ConnectionRefusedError("refused"), AmiError, "somewhere .*refused"),
        (ValueError("width"), ConfigurationError, "somewhere .*width"),
    ],
)
def test_what_may_be_over_soon_is_no_error_of_the_configuration(
    error: Exception, raised: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("fractions.Fraction", fail)
    with pytest.raises(raised, match=told) as caught:
        build({"_target_": "fractions.Fraction"}, "somewhere")
    assert isinstance(caught.value, ConfigurationError) == (raised is ConfigurationError)


def test_a_policy_input_that_is_no_trunk_is_told_which_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"^policy_input='nope' .*: image, memory$"):
        load_config(["policy_input=nope"])
    with pytest.raises(ConfigurationError, match=r"^policy_input='image' .*: vector$"):
        load_config(["experiment=cartpole", "policy_input=image"])


@pytest.mark.parametrize("policy_input", ["image", "memory"])
def test_the_policy_gets_the_trunk_that_is_chosen(policy_input: str) -> None:
    config = load_config([f"policy_input={policy_input}"])
    assert config.models.policy_value.trunk == config.models.trunks[policy_input]


def test_an_agent_without_models_of_its_own_is_possible() -> None:
    assert load_config(["~inference.agent.models"])


@pytest.mark.parametrize(
    "override", ["pace=lockstep", "lockstep_window=64", "policy_input=memory", "action.choices=[2]"]
)
def test_time_and_actions_are_agreed_upon(override: str) -> None:
    assert agreed(override) != agreed()


@pytest.mark.parametrize(
    "path",
    [r"C:\Users\太郎\runs", "/home/太郎/runs", r"C:\Program Files (x86)\a~1", r"D:\a,b", "D:\\a,b\\", 'say "x" y\\',
     "a=b", "x & y", "100%", r"\\server\share\runs", r"C:\x\=y", r"D:\runs\ new", r"C:\runs\\", "2026_11_24", "1e5",
     "true", "[x]/y", "'a'b"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["run_dir", "checkpoint"])
def test_a_path_is_taken_as_it_is_whatever_it_is_made_of(key: str, path: str) -> None:
    config = load_config([f"{key}={path}"])
    assert (config.run_dir if key == "run_dir" else config.checkpoint.restore) == path


def test_what_is_no_path_is_read_as_ever() -> None:
    config = load_config(["seed=3", "checkpoint=null", "inference.agent.models=[image_encoder]", "run_dir='a b'"])
    assert (config.seed, config.checkpoint.restore, config.run_dir) == (3, None, "a b")
    assert list(config.inference.agent.models) == ["image_encoder"]
    assert load_config(["run_dir=runs/${name}"]).run_dir == "runs/simulated"
    with pytest.raises(ConfigurationError, match="tiny,small"):
        load_config(["models=tiny,small"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=vrchat", "+world=vizdoom"],
        ["experiment=noise", "~trainers.image_vae", "+features=random_features", "trainer=random_features"],
        ["tracker.uri=file:mlruns"],
        ["tracker.uri=databricks"],
    ],
    ids=str,
)
def test_what_can_be_added_is_added(overrides: list[str]) -> None:
    load_config(overrides)
