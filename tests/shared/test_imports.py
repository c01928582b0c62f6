"""What each service may need, looked up in a fresh interpreter: an image holds only what its service imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import importlib, json, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
print(json.dumps([name for name in sys.argv[2].split() if name in sys.modules]))
"""

CONTROLLER = (
    "service hub coordinator tracker mlflow_run main cli.main cli.client cli.render cli.watch cli.doctor cli.up"
)
SHARED = (
    "wire records snapshots bus clock gate membership control metrics priority health config command"
    " service_command process limits errors"
)


def modules(package: str, names: str) -> str:
    return " ".join(f"{package}.{name}" for name in names.split())


@pytest.mark.parametrize(
    ("imported", "forbidden"),
    [
        (modules("ami_shared", SHARED), "torch cv2 mlflow pythonosc vizdoom rich PIL"),
        (modules("ami_controller", CONTROLLER), "torch cv2 mlflow pythonosc vizdoom"),
        ("ami_trainer.service ami_trainer.trainers", "cv2 pythonosc mlflow vizdoom"),
        ("ami_inference.service", "mlflow vizdoom rich"),
        ("ami_controller.main ami_inference.main ami_trainer.main", "torch cv2 mlflow pythonosc zmq.green"),
        ("ami_shared", "torch numpy zmq"),
    ],
    ids=["shared", "controller", "trainer", "inference", "commands before they know what to do", "the package alone"],
)
def test_a_service_imports_nothing_that_its_image_need_not_hold(imported: str, forbidden: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, imported, forbidden], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
