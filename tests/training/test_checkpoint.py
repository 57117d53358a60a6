from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.training import checkpoint
from rae_fast.training.checkpoint import Checkpointer
from rae_fast.training.engine import Engine

from .conftest import Regression, batches, regression, train_step

DECAYS = [0.9, "power_0.1"]


def train(engine: Engine, first: int, last: int) -> list[float]:
    x, y = batches(12, 8)
    losses = []
    for step in range(first, last):
        train_step(engine, x[step], y[step])
        losses.append(engine.record[0].item())
    return losses


def save_steps(folder: Path, engine: Engine, steps: list[int], **options: object) -> Checkpointer:
    checkpointer = Checkpointer(folder, Ranks(), background=False, **options)
    done = 0
    for step in steps:
        train(engine, done, step)
        checkpointer.save(step, {"model": engine}, {"position": step * 8})
        done = step
    return checkpointer


@pytest.mark.parametrize("kind", ["ddp", "zero-1", "zero-3"])
@pytest.mark.parametrize("background", [True, False])
def test_resumed_run_is_bit_identical_to_the_undisturbed_one(kind, background, make_engine, tmp_path):
    undisturbed = make_engine(kind, clip_grad=1.0, ema_decays=DECAYS, accumulation=2)
    losses = train(undisturbed, 0, 8)
    first = make_engine(kind, clip_grad=1.0, ema_decays=DECAYS, accumulation=2)
    checkpointer = Checkpointer(tmp_path, Ranks(), background=background)
    start = train(first, 0, 5)
    checkpointer.save(5, {"model": first}, {"epoch": 1})
    train(first, 5, 7)  # what the thread writes must be the weights of step 5
    checkpointer.wait()
    second = make_engine(kind, module=regression(9), clip_grad=1.0, ema_decays=DECAYS, accumulation=2)
    state = Checkpointer(tmp_path, Ranks()).restore({"model": second})
    assert state == {"epoch": 1, "step": 5}
    assert start + train(second, 5, 8) == losses
    for kind_of_state, tensors in undisturbed.flat_state().items():
        for a, b in zip(tensors, second.flat_state()[kind_of_state], strict=True):
            assert torch.equal(a, b), kind_of_state


def test_buffers_and_frozen_parameters_come_back(make_engine, tmp_path):
    module = regression()
    module.scale.data.fill_(3.0)
    module.offset.fill_(4.0)
    save_steps(tmp_path, make_engine(module=module), [1])
    for kind in ("ddp", "zero-1", "zero-3"):
        engine = make_engine(kind)
        Checkpointer(tmp_path, Ranks()).restore({"model": engine})
        weights = engine.weights()
        assert weights["scale"].eq(3).all()
        assert weights["offset"].eq(4).all()


def test_no_checkpoint_is_no_state(make_engine, tmp_path):
    assert Checkpointer(tmp_path / "none", Ranks()).restore({"model": make_engine()}) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damaged_newest_checkpoint_falls_back_and_says_so(damage, make_engine, tmp_path, capsys):
    save_steps(tmp_path, make_engine(ema_decays=DECAYS), [2, 4])
    newest = tmp_path / "step-0000004"
    data = newest / "rank-00000-of-00001.safetensors"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-5])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "remove":
        (newest / "state.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    engine = make_engine(ema_decays=DECAYS)
    state = Checkpointer(tmp_path, Ranks()).restore({"model": engine})
    assert state["step"] == engine.steps == 2
    said = capsys.readouterr().out
    assert "step-0000004 is damaged" in said
    # The run goes on and replaces the damaged one.
    train(engine, 2, 4)
    Checkpointer(tmp_path, Ranks(), background=False).save(4, {"model": engine}, {})
    assert Checkpointer(tmp_path, Ranks()).restore({"model": make_engine(ema_decays=DECAYS)})["step"] == 4


def test_only_damaged_checkpoints_are_an_error_not_a_new_start(make_engine, tmp_path):
    save_steps(tmp_path, make_engine(), [1])
    (tmp_path / "step-0000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        Checkpointer(tmp_path, Ranks()).restore({"model": make_engine()})


def test_death_while_saving_leaves_the_checkpoint_before(make_engine, tmp_path, monkeypatch):
    engine = make_engine()
    save_steps(tmp_path, engine, [2])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("save_file", "write_json", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, place, die)
            with pytest.raises(KeyboardInterrupt):
                Checkpointer(tmp_path, Ranks(), background=False).save(3, {"model": engine}, {})
        survivor = Checkpointer(tmp_path, Ranks())
        assert survivor.steps() == [2]
        assert survivor.restore({"model": make_engine()})["step"] == 2
    assert not list(tmp_path.glob(".*.part")), "the next start clears the remains"


def test_last_k_and_every_nth_checkpoint_are_kept(make_engine, tmp_path):
    checkpointer = save_steps(tmp_path, make_engine(), [1, 2, 3, 4, 5, 6, 7], keep=2, keep_every=3)
    assert checkpointer.steps() == [3, 6, 7]
    assert (tmp_path / "latest").read_text() == "step-0000007\n"


def test_unwritable_folder_is_reported_by_the_next_call(make_engine, tmp_path):
    (tmp_path / "file").write_text("")
    checkpointer = Checkpointer(tmp_path / "file" / "checkpoints", Ranks())
    checkpointer.save(1, {"model": make_engine()}, {})
    with pytest.raises(UserError, match="cannot write checkpoint"):
        checkpointer.wait()


def test_checkpoint_of_another_architecture_is_refused(make_engine, tmp_path):
    save_steps(tmp_path, make_engine(), [1])

    class Wider(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(16, 6)

    with pytest.raises(UserError, match=r"last\.bias has shape \[5\]; expected \[6\]"):
        Checkpointer(tmp_path, Ranks()).restore({"model": make_engine(module=Wider())})


def test_other_ema_decays_are_refused(make_engine, tmp_path):
    save_steps(tmp_path, make_engine(ema_decays=[0.9]), [1])
    with pytest.raises(UserError, match=r"holds EMA 0\.9; expected 0\.99"):
        Checkpointer(tmp_path, Ranks()).restore({"model": make_engine(ema_decays=[0.99])})


def test_manifest_names_every_file_with_size_and_checksum(make_engine, tmp_path):
    save_steps(tmp_path, make_engine(), [1])
    folder = tmp_path / "step-0000001"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert all(facts["bytes"] == (folder / name).stat().st_size for name, facts in files.items())


def test_two_engines_share_a_checkpoint(make_engine, tmp_path):
    first, second = make_engine("zero-1"), make_engine("zero-1", module=regression(5))
    train(first, 0, 3)
    train(second, 3, 5)
    Checkpointer(tmp_path, Ranks(), background=False).save(3, {"model": first, "disc": second}, {})
    fresh = {"model": make_engine("zero-1"), "disc": make_engine("zero-1")}
    Checkpointer(tmp_path, Ranks()).restore(fresh)
    for name, engine in (("model", first), ("disc", second)):
        assert all(torch.equal(v, fresh[name].weights()[k]) for k, v in engine.weights().items())
        assert fresh[name].scalar_state() == engine.scalar_state()
