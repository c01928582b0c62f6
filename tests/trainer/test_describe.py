"""What `ami-trainer --describe` prints, and the sizes that configurations promise."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ami_shared.config import build, load_config
from ami_trainer.describe import describe, names_in_use

SIZES = ("tiny", "small", "reference", "large", "huge")


def parameters(size: str) -> int:
    (total,) = re.findall(r"^all +([\d,]+)$", describe(load_config([f"models={size}"]).models), re.MULTILINE)
    return int(total.replace(",", ""))


def test_every_size_is_larger_than_the_one_before_and_the_largest_are_as_promised() -> None:
    counts = [parameters(size) for size in SIZES]
    assert counts == sorted(counts)
    assert counts[3] >= 100_000_000
    assert counts[4] >= 1_000_000_000


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_layers_and_bytes_are_those_of_the_models(size: str) -> None:
    models = load_config([f"models={size}"]).models
    told = describe(models)
    for name, section in models.items():
        if section is None or "_target_" not in section:
            continue
        model = build(section, name)
        count = sum(p.numel() for p in model.parameters())
        (line,) = [line for line in told.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1] == f"{count:,}"
        nbytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert float(line.split()[2]) == pytest.approx(nbytes / 1e6, abs=0.06)
        layers = [part for part, module in model.named_modules() if list(module.parameters(recurse=False))]
        assert all(f"  {part}: " in told for part in layers)


def test_the_command_prints_it_with_a_trainer_s_name_or_without() -> None:
    for words in ([], ["ppo"]):
        command = [sys.executable, "-m", "ami_trainer.main", *words, "--describe", "models=tiny"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "policy_value" in ended.stdout


def test_only_models_that_somebody_of_the_experiment_uses_are_told_of() -> None:
    assert names_in_use(load_config([])) == {"image_encoder", "image_decoder", "forward_dynamics", "policy_value"}
    assert "inverse_dynamics" in names_in_use(load_config(["experiment=doom", "features=inverse_dynamics"]))


def test_training_takes_parameters_gradients_two_moments_and_the_last_good() -> None:
    (line,) = [line for line in describe(load_config([]).models).splitlines() if line.startswith("forward_dynamics ")]
    _, count, _, _, training, _ = line.split()
    assert float(training) == pytest.approx(5 * 4 * int(count.replace(",", "")) / 1e6, abs=0.06)
