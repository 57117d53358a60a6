import contextlib
import shutil
import subprocess
import sys

from rae_fast.demo.stages import Stages

# Peaks while nothing, while 200 MB here for a time, and while 200 MB in a child to the end were held, in bytes.
HOLDERS = """
import subprocess, sys, time
from rae_fast.demo.stages import SAMPLE_INTERVAL_S, PeakMemory

with PeakMemory() as nothing:
    pass
with PeakMemory() as here:
    held = b"x" * 200_000_000
    time.sleep(10 * SAMPLE_INTERVAL_S)
    del held
holder = "import sys; held = b'x' * 200_000_000; print('held', flush=True); sys.stdin.read()"
with PeakMemory() as in_child:
    child = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
child.communicate()
print(nothing.peak_bytes, here.peak_bytes, in_child.peak_bytes)
"""


def _run(folder, log: list[str], inputs_b: object = "same") -> Stages:
    stages = Stages(folder)

    def step(name: str):
        def run() -> dict:
            log.append(name)
            return {"made_by": name}

        return run

    stages.run("a", "first", {"x": 1}, step("a"))
    stages.run("b", "second", inputs_b, step("b"))
    stages.run("c", "third", None, step("c"))
    return stages


def test_finished_stages_are_not_run_again(tmp_path) -> None:
    log: list[str] = []
    _run(tmp_path, log)
    again = _run(tmp_path, log)
    assert log == ["a", "b", "c"]
    assert again.results["c"] == {"made_by": "c"}
    assert set(again.seconds) == {"a", "b", "c"}


def test_a_changed_input_runs_its_stage_and_all_later_ones(tmp_path) -> None:
    log: list[str] = []
    _run(tmp_path, log)
    _run(tmp_path, log, inputs_b="other")
    assert log == ["a", "b", "c", "b", "c"]


def test_an_interrupted_stage_is_run_again_and_the_earlier_ones_are_not(tmp_path) -> None:
    log: list[str] = []
    stages = Stages(tmp_path)
    stages.run("a", "first", {"x": 1}, lambda: log.append("a") or {})

    def killed() -> dict:
        log.append("b")
        raise KeyboardInterrupt

    try:
        stages.run("b", "second", "same", killed)
    except KeyboardInterrupt:
        log.append("killed")
    _run(tmp_path, log)
    assert log == ["a", "b", "killed", "b", "c"]


def test_leftovers_are_kept_for_the_same_inputs_and_removed_for_others(tmp_path) -> None:
    output = tmp_path / "made"

    def begin_and_die() -> dict:
        output.mkdir()
        (output / "half").touch()
        raise KeyboardInterrupt

    def found() -> dict:
        return {"leftovers": output.exists()}

    for inputs, expected in (("same", True), ("other", False)):
        folder = tmp_path / inputs
        with contextlib.suppress(KeyboardInterrupt):
            Stages(folder).run("a", "first", "same", begin_and_die, [output])
        assert Stages(folder).run("a", "first", inputs, found, [output]) == {"leftovers": expected}
        shutil.rmtree(output, ignore_errors=True)


def test_peak_memory_sees_what_was_held_meanwhile_here_and_in_children() -> None:
    # In a process of its own: one that ran other tests may hold freed memory, in which new arrays find their place.
    done = subprocess.run([sys.executable, "-c", HOLDERS], capture_output=True, text=True, check=True)
    nothing, here, in_child = map(int, done.stdout.split())
    assert here > nothing + 150_000_000
    assert in_child > nothing + 150_000_000
