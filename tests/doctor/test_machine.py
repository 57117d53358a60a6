"""What is said of a machine: probes that pass, fail, crash and hang, and which jobs they stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_fast.doctor import host_probes, machine, probes, torch_probes
from rae_fast.doctor.machine import can_run, check_jobs, examine_machine, obstacles, read_trials, tell
from rae_fast.doctor.trial import CACHE, DEMO, KERNELS, MISSING, OK, SLOW, TRAIN, Trial
from rae_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def lines(*content: dict) -> str:
    return "".join(json.dumps(line) + "\n" for line in content)


def trial(name: str, state: str = OK, stops: tuple[str, ...] = ()) -> Trial:
    return Trial(name, state, "found", "cost" * (state != OK), "mend" * (state != OK), stops)


def test_jobs_are_stopped_by_what_is_missing_and_not_by_what_is_slow() -> None:
    trials = [trial("a"), trial("b", SLOW), trial("c", MISSING, (TRAIN, KERNELS)), trial("d", MISSING)]
    assert obstacles(trials) == {DEMO: [], CACHE: [], TRAIN: ["c"], KERNELS: ["c"]}
    assert [can_run(trials, job) for job in (DEMO, CACHE, TRAIN, KERNELS)] == [True, True, False, False]
    text = tell(trials).splitlines()
    assert text[2] == "missing  c  found; costs: cost; mend"
    assert text[-4:-1] == ["demo     can run here", "cache    can run here", "train    cannot run here: c"]


def test_of_what_gave_no_answer_nothing_is_claimed() -> None:
    late = read_trials("images", lines({"begins": "probe_dali"}), "", None)
    assert not can_run(late, CACHE) and can_run(late, KERNELS)
    assert "cache    cannot be told: no answer from dali" in tell(late)


def test_a_group_that_dies_is_told_apart_from_one_that_had_no_time() -> None:
    output = "a library prints\n" + lines({"begins": "probe_dali"})
    dead = read_trials("images", output, "Segmentation fault\n", -11)
    assert [(t.name, t.state, t.stops) for t in dead] == [
        ("dali", MISSING, (DEMO, CACHE)),
        ("nvjpeg", MISSING, ()),
    ]
    assert "status -11" in dead[0].found and "Segmentation fault" in dead[0].found and "dali died" in dead[1].found
    late = read_trials("images", output, "", None)
    assert [t.state for t in late] == [SLOW, SLOW]
    assert "no answer in" in late[0].found and "load average" in late[0].found
    unborn = read_trials("torch", "", "No module named rae_fast\n", 1)
    assert unborn[-1].state == MISSING and unborn[-1].stops == (DEMO,)


def test_what_a_group_printed_is_read_back() -> None:
    given = trial("DALI", SLOW)
    rest = {"begins": "probe_nvjpeg"}
    shown = {**given.__dict__, "stops": []}
    assert read_trials("images", lines({"begins": "probe_dali"}, shown, rest), "", None)[0] == given


def test_a_probe_that_raises_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def probe_dali() -> Trial:
        raise ImportError("libnvjpeg.so: cannot open shared object file")

    monkeypatch.setitem(probes.GROUPS, "images", (probe_dali,))
    probes.run_group("images", Path())
    begun, found = map(json.loads, capsys.readouterr().out.splitlines())
    assert begun == {"begins": "probe_dali"}
    assert found["state"] == MISSING and "libnvjpeg.so" in found["found"] and set(found["stops"]) == {DEMO, CACHE}
    assert "pip install" in found["mend"]


@pytest.mark.parametrize(
    "probe",
    [host_probes.probe_python, host_probes.probe_packages, host_probes.probe_memory, host_probes.probe_compiler],
)
def test_plain_probes_pass_where_tests_run(probe: Callable[[], Trial]) -> None:
    assert probe().state == OK or probe is host_probes.probe_memory


def test_a_missing_package_and_an_old_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["no-such-package>=1", "numpy>=99", "torch>=2.9", "pyarrow>=99; extra == 'parquet'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: wanted)
    found = host_probes.probe_packages()
    assert found.state == MISSING and found.stops == (DEMO, CACHE, TRAIN)
    assert "no-such-package is missing" in found.found and "instead of >=99" in found.found
    assert "torch" not in found.found and "pyarrow" not in found.found


def test_without_a_compiler_crops_are_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "/no/such/cc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from rae_fast.latents.gather import gather_library

    gather_library.cache_clear()
    found = host_probes.probe_compiler()
    gather_library.cache_clear()
    assert found.state == SLOW and "no C compiler" in found.found and found.stops == ()


def test_rates_of_a_disk_are_measured_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_probes, "WRITTEN_BYTES", 4 << 20)
    monkeypatch.setattr(host_probes, "READ_S", 0.2)
    found = host_probes.probe_disk(tmp_path)
    assert "random reads" in found.found and found.state in (OK, SLOW)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(host_probes, "DEMO_BYTES", 1e18)
    full = host_probes.probe_disk(tmp_path)
    assert full.state == MISSING and full.stops == (DEMO, CACHE)


def test_the_driver_is_asked_through_its_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 590.1, 81559 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert torch_probes.probe_driver().found == "1 x NVIDIA H100, 590.1, 81559 MiB"
    tool.write_text("#!/bin/sh\necho 'no devices were found' >&2\nexit 6\n")
    failed = torch_probes.probe_driver()
    assert failed.state == MISSING and "no devices were found" in failed.found
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert torch_probes.probe_driver().found == "no nvidia-smi"


def test_missing_weights_are_named_with_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = list(torch_probes.probe_weights())
    assert [t.state for t in found] == [MISSING, MISSING] and all(t.stops == () for t in found)
    assert all(str(tmp_path / "hub/checkpoints") in t.mend for t in found)
    place = tmp_path / "hub/checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.touch()
    assert [t.state for t in torch_probes.probe_weights()] == [MISSING, OK]


def test_groups_that_hang_do_not_keep_the_others_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(machine, "TIMEOUT_S", 0.5)
    started_s = time.monotonic()
    trials = examine_machine(tmp_path)
    assert time.monotonic() - started_s < 40
    assert len(trials) > 5 and all(t.state == SLOW and "load average" in t.found for t in trials)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        examine_machine(tmp_path / "none")
    with pytest.raises(UserError, match="did you mean 'train'"):
        check_jobs(["trian"])


def test_the_tool_refuses_bad_input_in_one_line() -> None:
    command = [sys.executable, str(ROOT / "tools/doctor.py"), "--need", "dmeo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "did you mean 'demo'" in done.stderr


@pytest.mark.slow
def test_a_whole_examination_ends_within_a_minute(tmp_path: Path) -> None:
    started_s = time.monotonic()
    command = [sys.executable, str(ROOT / "tools/doctor.py"), "--need", "cache", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert time.monotonic() - started_s < 60
    assert done.returncode == 0, done.stdout
    for name in ("Python", "torch", "CUDA", "driver", "DALI", "nvJPEG", "Triton", "DeepSpeed", "compiler", "disk"):
        assert name in done.stdout
    assert "cache    can run here" in done.stdout
