from __future__ import annotations

import pytest

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.training.trace import StepTrace, parse_steps


def test_steps_are_first_to_last():
    assert parse_steps("10..15") == (10, 15)
    assert parse_steps("3..3") == (3, 3)


@pytest.mark.parametrize("text", ["10", "15..10", "a..b", "10-15"])
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match=r"as 10\.\.15"):
        parse_steps(text)


def test_nothing_is_traced_unless_asked_for(tmp_path):
    trace = StepTrace(None, tmp_path, Ranks())
    for step in range(3):
        trace.before(step)
        trace.after(step)
    assert not list(tmp_path.iterdir())
