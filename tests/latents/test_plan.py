import pytest

from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.latents.plan import normalization, statistics_path


def test_statistics_are_computed_even_where_a_file_of_the_models_exists(tmp_path) -> None:
    """A second build, after the first one's statistics were saved, must be the same build."""
    stat = tmp_path / "stat.pt"
    key = f"stage_1.params.normalization_stat_path={stat}"
    before = normalization(load_config(None, [key]))
    stat.write_bytes(b"statistics")
    assert normalization(load_config(None, [key])) == before
    assert before["source"] == "computed"


def test_given_statistics_are_the_models_or_a_named_file(tmp_path) -> None:
    models, named = tmp_path / "stat.pt", tmp_path / "other.pt"
    models.write_bytes(b"models")
    named.write_bytes(b"named")
    key = f"stage_1.params.normalization_stat_path={models}"
    of_model = load_config(None, [key, "cache.statistics=given"])
    of_name = load_config(None, [key, f"cache.statistics={named}"])
    assert statistics_path(of_model) == str(models)
    assert statistics_path(of_name) == str(named)
    assert normalization(of_model)["sha256"] != normalization(of_name)["sha256"]
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        normalization(load_config(None, [f"cache.statistics={tmp_path / 'none.pt'}"]))
