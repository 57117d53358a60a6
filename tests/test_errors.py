import pytest

from rae_fast.errors import UserError, exit_cleanly, nearest


def test_a_user_error_says_found_expected_and_cure_in_one_line() -> None:
    error = UserError("data.source is 'x\ny'", "a folder", "create it")
    assert str(error) == "data.source is 'x y'; expected a folder; create it"


def test_nearest_suggests_only_what_is_close() -> None:
    assert nearest("max_stps", ["max_steps", "epochs"]) == " (did you mean 'max_steps'?)"
    assert nearest("zzz", ["max_steps", "epochs"]) == ""


@pytest.mark.parametrize(("problem", "status"), [(UserError("bad"), 2), (KeyboardInterrupt(), 130)])
def test_a_tool_ends_with_a_line_and_a_status(capsys, problem: BaseException, status: int) -> None:
    def main() -> None:
        raise problem

    with pytest.raises(SystemExit) as ended:
        exit_cleanly(main)
    assert ended.value.code == status
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_bug_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_cleanly(main)
