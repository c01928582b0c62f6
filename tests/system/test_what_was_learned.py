"""Nothing that was learned is forgotten, whatever dies."""

from __future__ import annotations

from collections.abc import Callable

from processes import System, poll_for


def first_error(system: System) -> float:
    """Return the first reconstruction error on fresh frames that this trainer's process measured."""
    told = poll_for(lambda: (system.service("image_vae").get("fresh_error") or {}).get("first"), 30.0, "an error")
    return float(told)


def test_a_system_that_was_killed_goes_on_with_what_it_had_learned(make_system: Callable[..., System]) -> None:
    system = make_system()
    names = ("world", "controller", "image_vae", "body")
    first_life = [system.start(name) for name in names]
    system.wait_running()
    new = first_error(system)
    poll_for(lambda: system.service("image_vae")["fresh_error"]["now"] < new / 3, 60.0, "something learned")
    kept = system.model()["version"]
    assert system.ami("shutdown").returncode == 0
    for process in first_life[1:]:
        assert process.exit_code(5.0) == 0

    second_life = [system.start(name) for name in names[1:]]
    system.wait_running()
    assert first_error(system) < new / 2
    with system.listening() as collect:
        assert min(int(batch.versions["image_encoder"].min()) for batch in collect(1.0)) >= kept

    for process in second_life:
        process.kill()
    for name in names[1:]:
        system.start(name)
    system.wait_running()
    assert first_error(system) < new / 2


def test_parameters_of_other_models_end_up_with_one_line(make_system: Callable[..., System]) -> None:
    system = make_system("experiment=noise")
    first = system.start("up")
    system.wait_running()
    poll_for(lambda: system.model()["version"] >= 1, 20.0, "a snapshot")
    assert system.ami("shutdown").returncode == 0
    assert first.exit_code(10.0) == 0
    second = system.start("up", "models=small")
    assert second.exit_code(20.0) == 2
    assert "has the parameters of other models" in second.output
    assert "another run_dir" in second.output
    assert "Traceback" not in second.output
