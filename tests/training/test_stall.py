from __future__ import annotations

import time

from rae_fast.runtime import Ranks
from rae_fast.training.stall import Heartbeat


def test_standing_still_says_which_rank_waits_for_what(tmp_path, capfd):
    beats = [Heartbeat(tmp_path, Ranks(rank, rank, 3), stall_s=0.3, interval_s=0.05) for rank in range(3)]
    for beat in beats:
        beat.__enter__()
        beat.stepped(7)
    beats[0].enter("optimizer step and gradient reduction")
    beats[1].enter("waiting for data")
    beats[2].enter("optimizer step and gradient reduction")
    deadline_s = time.monotonic() + 20
    said = ""
    while "no step has ended" not in said and time.monotonic() < deadline_s:
        time.sleep(0.05)
        said += capfd.readouterr().err
    for beat in beats:
        beat.__exit__()
    first, rest = said.split("; ", 1)
    assert first.startswith("no step has ended for ")
    # The rank that the others wait for comes first.
    assert rest.startswith("rank 1: waiting for data (step 7) for ")
    assert "rank 0, 2: optimizer step and gradient reduction (step 7)" in rest
    assert said.count("no step has ended") == 1, "once for each stall, by the first rank of the machine"


def test_dead_rank_is_named(tmp_path):
    with Heartbeat(tmp_path, Ranks(0, 0, 2), stall_s=100, interval_s=0.05) as beat:
        time.sleep(0.2)
        assert "rank 1: gone" in beat.report()


def test_steps_in_time_say_nothing(tmp_path, capfd):
    with Heartbeat(tmp_path, Ranks(), stall_s=5, interval_s=0.02) as beat:
        for step in range(5):
            time.sleep(0.03)
            beat.stepped(step)
    assert capfd.readouterr().err == ""
    assert not list((tmp_path / ".ranks").iterdir())
