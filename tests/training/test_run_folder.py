from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.provenance import read_json
from rae_fast.runtime import Ranks
from rae_fast.training import run_folder
from rae_fast.training.run_folder import StopSignals, describe_run, share_threads, sole_run

HOLD = """
import sys, time
from pathlib import Path
from rae_fast.runtime import Ranks
from rae_fast.training.run_folder import sole_run
with sole_run(Path(sys.argv[1]), Ranks()):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.3)
    with pytest.raises(UserError, match="another run is at work"), sole_run(tmp_path, Ranks()):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with sole_run(tmp_path, Ranks()):
        pass


def test_unwritable_run_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write run folder"), sole_run(tmp_path / "file" / "run", Ranks()):
        pass


def test_run_says_what_it_was_made_from_and_keeps_to_it(tmp_path):
    cpu = torch.device("cpu")
    describe_run(tmp_path, Config(), Ranks(), cpu, {"seed": 1, "shape": (8, 4, 4)}, store={"url": "x"})
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["identity"] == {"seed": 1, "shape": [8, 4, 4]}
    assert manifest["store"] == {"url": "x"}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert load_config(tmp_path / "config.yaml") == Config()
    describe_run(tmp_path, Config(), Ranks(), cpu, {"seed": 1, "shape": (8, 4, 4)}, store={"url": "moved"})
    with pytest.raises(UserError, match="begun with seed 1; now it is 2"):
        describe_run(tmp_path, Config(), Ranks(), cpu, {"seed": 2, "shape": (8, 4, 4)})


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert not signals.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_sigterm_kills():
    code = (
        "import os, signal\n"
        "from rae_fast.training.run_folder import StopSignals\n"
        "with StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('alive', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "noted\n"


def test_ranks_on_one_cpu_share_its_cores(monkeypatch):
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", str(cores))
    try:
        share_threads(Ranks(world=cores), torch.device("cpu"))
        assert torch.get_num_threads() == (1 if cores > 1 else before)
    finally:
        torch.set_num_threads(before)
