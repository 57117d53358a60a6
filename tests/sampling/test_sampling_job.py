from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.sampling import EXACT_BATCH
from rae_fast.sampling_job import SamplingJob, class_numbers, image_path, run_sampling

LABELS = np.arange(EXACT_BATCH * 2 + 5) % 3


def _bytes(folder, count: int = len(LABELS)) -> list[bytes]:
    return [image_path(folder, i).read_bytes() for i in range(count)]


def test_the_same_bytes_on_one_rank_and_on_two(config, tmp_path) -> None:
    run_sampling(config, SamplingJob(tmp_path / "one", LABELS), Ranks())
    for rank in (1, 0):  # without a process group a rank does its own part and waits for nobody
        job = SamplingJob(tmp_path / "two", LABELS)
        _own_part(config, job, Ranks(rank, rank, 2))
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def _own_part(config, job: SamplingJob, ranks: Ranks) -> None:
    from rae_fast import sampling_job
    from rae_fast.autoencoder.rae import build_rae
    from rae_fast.geometry import resolve_geometry
    from rae_fast.runtime import pick_device
    from rae_fast.sampling import load_sampler

    device = pick_device("cpu")
    sampler = load_sampler(config, resolve_geometry(config), device)
    rae = build_rae(config.stage_1, need_encoder=False).to(device).eval()
    sampling_job._draw_missing(sampler, rae, job, ranks)


def test_a_sample_does_not_depend_on_how_many_are_drawn(config, tmp_path) -> None:
    run_sampling(config, SamplingJob(tmp_path / "many", LABELS), Ranks())
    run_sampling(config, SamplingJob(tmp_path / "few", LABELS[:7]), Ranks())
    assert _bytes(tmp_path / "few", 7) == _bytes(tmp_path / "many", 7)


def test_samples_differ_by_index_and_by_seed(config, tmp_path) -> None:
    same_class = np.zeros(4, np.int64)
    run_sampling(config, SamplingJob(tmp_path / "a", same_class, seed=0), Ranks())
    run_sampling(config, SamplingJob(tmp_path / "b", same_class, seed=1), Ranks())
    assert len(set(_bytes(tmp_path / "a", 4) + _bytes(tmp_path / "b", 4))) == 8


def test_an_interrupted_run_goes_on_and_draws_only_what_is_missing(config, tmp_path) -> None:
    job = SamplingJob(tmp_path / "run", LABELS, npz=True)
    run_sampling(config, job, Ranks())
    whole = _bytes(tmp_path / "run")
    image_path(job.folder, EXACT_BATCH + 3).unlink()
    untouched = image_path(job.folder, 0).stat().st_mtime_ns
    run_sampling(config, job, Ranks())
    assert _bytes(tmp_path / "run") == whole
    assert image_path(job.folder, 0).stat().st_mtime_ns == untouched


def test_archive_and_grid_hold_the_images(config, tmp_path) -> None:
    run_sampling(config, SamplingJob(tmp_path / "run", LABELS, npz=True), Ranks())
    archive = np.load(tmp_path / "run/samples.npz")
    assert archive["arr_0"].shape == (len(LABELS), 16, 16, 3)
    assert np.array_equal(archive["labels"], LABELS)
    with Image.open(image_path(tmp_path / "run", 3)) as image:
        assert np.array_equal(np.asarray(image), archive["arr_0"][3])
    assert (tmp_path / "run/grid.png").exists()


@pytest.mark.parametrize("change", ["seed", "labels", "steps"])
def test_a_folder_of_other_samples_is_refused(config, tmp_path, change: str) -> None:
    job = SamplingJob(tmp_path / "run", LABELS[:5])
    run_sampling(config, job, Ranks())
    before = _bytes(tmp_path / "run", 5)
    if change == "seed":
        job = replace(job, seed=1)
    elif change == "labels":
        job = replace(job, labels=LABELS[1:6])
    else:
        params = replace(config.sampler.params, num_steps=5)
        config = replace(config, sampler=replace(config.sampler, params=params))
    with pytest.raises(UserError, match="holds samples with"):
        run_sampling(config, job, Ranks())
    assert _bytes(tmp_path / "run", 5) == before


def test_classes_by_number_and_by_name() -> None:
    assert class_numbers(["ring", "0"], ("cross", "ring"), 2) == [1, 0]
    for wrong in ("2", "rng", "-1"):
        with pytest.raises(UserError, match=wrong):
            class_numbers([wrong], ("cross", "ring"), 2)


def test_labels_outside_of_the_model_are_refused(config, tmp_path) -> None:
    with pytest.raises(UserError, match="label 3"):
        run_sampling(config, SamplingJob(tmp_path / "run", np.array([3])), Ranks())
