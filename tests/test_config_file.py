from pathlib import Path

import pytest

from rae_fast.config_file import load_config, to_yaml
from rae_fast.errors import UserError

OFFICIAL_SAMPLING = """
stage_1:
  target: stage1.RAE
  params:
    encoder_cls: Dinov2withNorm
    encoder_config_path: facebook/dinov2-with-registers-base
    encoder_input_size: 224
    encoder_params: {dinov2_path: facebook/dinov2-with-registers-base, normalize: true}
    decoder_config_path: configs/decoder/ViTXL
    pretrained_decoder_path: models/decoders/model.pt
    noise_tau: 0.
    reshape_to_2d: true
    normalization_stat_path: models/stats/stat.pt
stage_2:
  target: stage2.models.DDT.DiTwDDTHead
  ckpt: models/DiTs/stage2_model.pt
  params: {input_size: 16, patch_size: 1, in_channels: 768, hidden_size: [1152, 2048], depth: [28, 2],
    num_heads: [16, 16], mlp_ratio: 4.0, class_dropout_prob: 0.1, num_classes: 1000, use_qknorm: false,
    use_swiglu: true, use_rope: true, use_rmsnorm: true, wo_shift: false, use_pos_embed: true}
transport:
  params: {path_type: Linear, prediction: velocity, loss_weight: null, time_dist_type: uniform}
sampler:
  mode: ODE
  params: {sampling_method: euler, num_steps: 50, atol: 1e-6, rtol: 1e-3, reverse: false}
guidance:
  method: autoguidance
  scale: 1.42
  t-min: 0.0
  t-max: 1.0
  guidance_model:
    target: stage2.models.DDT.DiTwDDTHead
    ckpt: models/DiTs/guide.pt
    params: {input_size: 16, in_channels: 768, hidden_size: [384, 2048], depth: [12, 2], num_heads: [6, 16]}
misc:
  latent_size: [768, 16, 16]
  num_classes: 1000
  time_dist_shift_dim: 196608
  time_dist_shift_base: 4096
"""

LEGACY_TRAINING = """
training:
  epochs: 800
  global_batch_size: 1024
  ema_decay: 0.9995
  log_every: 50
  ckpt_every: 5000
  base_lr: 2e-4
  final_lr: 2e-5
  beta: [0.9, 0.95]
  wd: 0.1
  schedule_type: linear
  decay_start_epoch: 40
  decay_end_epoch: 800
"""


def _write(tmp_path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_an_official_file_loads_as_it_is(tmp_path) -> None:
    config = load_config(_write(tmp_path, OFFICIAL_SAMPLING))
    assert config.guidance.t_min == 0.0
    assert config.guidance.guidance_model.params["hidden_size"] == [384, 2048]
    assert config.sampler.params.atol == 1e-6
    assert config.stage_1.params.encoder_params["dinov2_path"] == "facebook/dinov2-with-registers-base"


def test_legacy_flat_keys_move_to_their_sections(tmp_path) -> None:
    training = load_config(_write(tmp_path, LEGACY_TRAINING)).training
    assert training.optimizer.lr == 2e-4
    assert training.optimizer.betas == [0.9, 0.95]
    assert training.optimizer.weight_decay == 0.1
    assert training.scheduler.type == "linear"
    assert training.scheduler.warmup_epochs == 40
    assert training.scheduler.decay_end_epoch == 800
    assert training.scheduler.final_lr == 2e-5
    assert (training.log_interval, training.checkpoint_every) == (50, 5000)


def test_the_written_config_reads_back_equal(tmp_path) -> None:
    config = load_config(_write(tmp_path, OFFICIAL_SAMPLING), ["training.max_steps=7", "cache.views=[original]"])
    assert load_config(_write(tmp_path, to_yaml(config))) == config


def test_overrides_win_and_know_dashes(tmp_path) -> None:
    config = load_config(_write(tmp_path, OFFICIAL_SAMPLING), ["guidance.t-max=0.5", "sampler.params.num_steps=10"])
    assert config.guidance.t_max == 0.5
    assert config.sampler.params.num_steps == 10


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.max_stps=5", r"training\.max_stps \(did you mean 'max_steps'\?\)"),
        ("trainig.epochs=5", r"trainig \(did you mean 'training'\?\)"),
        ("stage_2.params.hiden_size=3", r"stage_2\.params\.hiden_size \(did you mean 'hidden_size'\?\)"),
        ("training.epochs=many", r"training\.epochs.*expected int"),
        ("data.crop=exat", r"data\.crop is 'exat' \(did you mean 'exact'\?\); expected one of exact, fast"),
        ("training=3", "training is 3; expected a mapping"),
        ("cache.views=[mirror]", "cache.views holds 'mirror'"),
        ("stage_1.target=stage1.VAE", r"stage_1\.target is 'stage1\.VAE' \(did you mean 'stage1\.RAE'\?\)"),
        ("stage_1.params.encoder_cls=Dinov2WithNorm", "did you mean 'Dinov2withNorm'"),
        ("guidance.method=autoguidance", None),
        ("noequals", "expected key=value"),
        ("--flag=1", "expected key=value"),
    ],
)
def test_bad_arguments_name_key_value_and_cure(override: str, said: str | None) -> None:
    if said is None:
        load_config(None, [override])  # harmless as long as the scale is 1
        with pytest.raises(UserError, match="guidance_model"):
            load_config(None, [override, "guidance.scale=2"])
        return
    with pytest.raises(UserError, match=said):
        load_config(None, [override])


@pytest.mark.parametrize(("text", "said"), [("a: [", "cannot be read"), ("- 1\n- 2\n", "holds a list")])
def test_broken_yaml_is_one_line(tmp_path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_config(_write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")


def test_a_home_folder_is_spelt_out_wherever_a_path_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("logging: {run_folder: ~/runs/a}\n")
    config = load_config(tmp_path / "config.yaml", ["cache.path=~/store", "data.source=~/photos"])
    assert config.logging.run_folder == str(tmp_path / "runs/a")
    assert config.cache.path == str(tmp_path / "store")
    assert config.data.source == str(tmp_path / "photos")
