"""What this machine can run, and why not: all probes at once, each group in a process that may crash alone.

Imports nothing but the standard library, so that it can tell what else is broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rae_fast.doctor.probes import GROUPS, STOPS, title
from rae_fast.doctor.trial import JOBS, KERNELS, MISSING, SLOW, Trial
from rae_fast.errors import UserError, nearest

TIMEOUT_S = 40.0


def examine_machine(folder: Path) -> list[Trial]:
    """Trials of all groups, within a minute.

    Args:
        folder: where stores will be; its disk is tried.

    Raises:
        UserError: the folder is not one that can be written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "a folder on the disk that stores will be on")
    deadline_s = time.monotonic() + TIMEOUT_S
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for group in GROUPS:
            output, errors = ((Path(scratch) / f"{group}.{kind}").open("w+") for kind in ("out", "err"))
            command = [sys.executable, "-W", "ignore", "-m", "rae_fast.doctor.probes", group, str(folder)]
            running.append((group, subprocess.Popen(command, stdout=output, stderr=errors), output, errors))
        trials: list[Trial] = []
        for group, process, output, errors in running:
            try:
                status = process.wait(max(1.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
            output.seek(0), errors.seek(0)
            trials += read_trials(group, output.read(), errors.read(), status)
            output.close(), errors.close()
    return trials


def read_trials(group: str, output: str, errors: str, status: int | None) -> list[Trial]:
    """The trials that a group's process printed, and one for each probe that it did not come to.

    Args:
        group: its name.
        output, errors: what it printed.
        status: its exit status; None if it was stopped for its time.
    """
    trials, begun, finished = [], "", set[str]()
    for line in output.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if not isinstance(content, dict):
            continue
        if "begins" in content:
            finished |= {begun}
            begun = content["begins"]
        elif "state" in content:
            trials.append(Trial(**{**content, "stops": tuple(content["stops"])}))
            finished |= {begun}
    last = (errors.strip().splitlines() or [""])[-1]
    for probe in GROUPS[group]:
        if probe.__name__ in finished:
            continue
        name, before = title(probe), begun.removeprefix("probe_") or group
        stops = STOPS.get(probe.__name__, ())
        if status is None:
            found = f"no answer in {TIMEOUT_S:.0f} s" if name == before else f"no time left after {before}"
            busy = f"load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
            trials.append(Trial(name, SLOW, f"{found}, {busy}", "", "try again when the machine is idle", stops))
        else:
            found = f"its process died (status {status}): {last}" if name == before else f"not tried: {before} died"
            trials.append(Trial(name, MISSING, found, "", "", stops))
    return trials


def obstacles(trials: Sequence[Trial], state: str = MISSING) -> dict[str, list[str]]:
    """Job -> names of what stops it; with state `slow`, of what it needs and what gave no answer in time."""
    return {job: [t.name for t in trials if t.state == state and job in t.stops] for job in JOBS}


def can_run(trials: Sequence[Trial], job: str) -> bool:
    """Whether nothing that a job needs is missing, and all of it has answered."""
    return not (obstacles(trials)[job] or obstacles(trials, SLOW)[job])


def tell(trials: Sequence[Trial]) -> str:
    """A line for each trial, and one for each job."""
    width = max(len(trial.name) for trial in trials)
    lines = []
    for trial in trials:
        parts = [trial.found, *([f"costs: {trial.cost}"] if trial.cost else []), *([trial.mend] if trial.mend else [])]
        lines.append(f"{trial.state:<8} {trial.name:<{width}}  {'; '.join(parts)}")
    lines.append("")
    missing, silent = obstacles(trials), obstacles(trials, SLOW)
    for job in JOBS:
        verdict = "can run here"
        if missing[job]:
            note = "; their tests run in the interpreter" if job == KERNELS else ""
            verdict = f"cannot run here: {', '.join(missing[job])}{note}"
        elif silent[job]:
            verdict = f"cannot be told: no answer from {', '.join(silent[job])}"
        lines.append(f"{job:<8} {verdict}")
    return "\n".join(lines)


def check_jobs(names: Sequence[str]) -> None:
    """Refuse names that are no jobs.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name not in JOBS:
            raise UserError(f"--need {name!r}{nearest(name, JOBS)}", f"some of {', '.join(JOBS)}")
