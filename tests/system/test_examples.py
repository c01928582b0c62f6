"""The examples of docs/extending.md, cut out of the page and run together as real processes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from processes import System, poll_for

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_examples_form_a_system_that_learns(make_system: Callable[..., System], tmp_path: Path) -> None:
    modules, configs = tmp_path / "modules", tmp_path / "configs"
    modules.mkdir()
    shutil.copytree(ROOT / "configs", configs)
    blocks = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())
    for kind, name, text in blocks:
        (configs / "experiment" / name if kind == "yaml" else modules / name).write_text(text)
    assert {kind for kind, _, _ in blocks} == {"python", "yaml"}
    system = make_system("experiment=corridor", models="vector")
    path = os.pathsep.join(filter(None, (str(modules), os.environ.get("PYTHONPATH", ""))))
    system.start("up", environment={"PYTHONPATH": path, "AMI_CONFIG_DIR": str(configs)})
    system.wait_running(60.0)
    poll_for(lambda: system.model("policy_value")["used"].get("body", 0) >= 3, 30.0, "a policy that was learned")
    poll_for(lambda: system.model("whereabouts")["version"] >= 2, 30.0, "whereabouts that were learned")
    status = system.status()
    assert status["experience"][0]["lost"] == {"ppo": 0, "whereabouts": 0}
    assert system.service("whereabouts")["losses"]["loss"] < 1.0
    assert system.ami("shutdown").returncode == 0
