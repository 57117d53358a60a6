from rae_fast.progress import Progress, clock


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3600, 3725)] == ["0:00", "1:00", "1:00:00", "1:02:05"]


def test_last_state_is_printed_with_rate_and_facts(capsys) -> None:
    progress = Progress(10, "images", "encode", done=4)
    progress.advance(6, failures=1, loss=0.123456)
    progress.close()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("encode: 10/10 images")
    assert "0:00 left" in line
    assert line.endswith("failures=1  loss=0.1235")


def test_other_ranks_are_silent(capsys) -> None:
    progress = Progress(1, "images", "encode", enabled=False)
    progress.advance()
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_last_state_that_was_printed_is_not_printed_again(capsys, monkeypatch) -> None:
    monkeypatch.setattr("rae_fast.progress.LOG_INTERVAL_S", 0.0)
    progress = Progress(2, "images", "encode")
    progress.advance(2)
    progress.close()
    assert len(capsys.readouterr().err.splitlines()) == 1
