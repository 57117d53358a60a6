import json

import pytest

from rae_fast.config import Stage1Params
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.geometry import encoder_facts, resolve_geometry

DINO_BASE = [
    "stage_1.params.encoder_params.dinov2_path=facebook/dinov2-with-registers-base",
    "stage_2.params.in_channels=768",
]


def _geometry(*overrides: str):
    return resolve_geometry(load_config(None, [*DINO_BASE, *overrides]))


def test_sizes_follow_from_the_encoder() -> None:
    geometry = _geometry("misc.num_classes=1000")
    assert geometry.latent_shape == (768, 16, 16)
    assert geometry.image_size == 256
    assert (geometry.num_classes, geometry.null_label) == (1000, 1000)
    assert geometry.shift == pytest.approx(6.9282, abs=1e-4)


def test_512_pixels_shift() -> None:
    geometry = _geometry("stage_1.params.encoder_input_size=448")
    assert geometry.latent_shape == (768, 32, 32)
    assert geometry.shift == pytest.approx(13.8564, abs=1e-4)


def test_the_contradiction_of_the_official_512_px_file_is_named() -> None:
    with pytest.raises(UserError, match=r"misc\.latent_size is \[768, 16, 16\].*448 / patch 14 = 32x32"):
        _geometry(
            "stage_1.params.encoder_input_size=448", "misc.latent_size=[768,16,16]", "stage_2.params.input_size=16"
        )
    with pytest.raises(UserError, match=r"stage_2\.params\.input_size is 16.*448 / patch 14 = 32x32"):
        _geometry("stage_1.params.encoder_input_size=448", "stage_2.params.input_size=16")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage_1.params.encoder_input_size=225"], "multiple of the encoder's patch size 14"),
        (["stage_2.params.in_channels=384"], "in_channels is 384, but the latents have 768"),
        (["data.image_size=512"], r"data\.image_size is 512.*makes 256"),
        (["misc.num_classes=10", "stage_2.params.num_classes=1000"], "misc.num_classes is 10"),
        (["stage_2.params.hidden_size=[1152,2048]", "stage_2.params.num_heads=[7,16]"], "head dimension"),
        (["misc.time_dist_shift_base=0"], "time_dist_shift_base"),
        (["misc.time_dist_shift_dim=0"], "time_dist_shift_dim is 0"),
        (["misc.num_classes=0"], "num_classes is 0; expected a positive number"),
        (["misc.num_classes=10", "misc.null_label=11"], "null_label is 11, but misc.num_classes is 10"),
        (["misc.null_label=-1", "misc.num_classes=10"], "null_label is -1"),
        (["stage_1.params.encoder_input_size=0"], "encoder_input_size is 0"),
        (["stage_1.params.decoder_patch_size=0"], "decoder_patch_size is 0"),
        (["stage_1.params.reshape_to_2d=false"], "reshape_to_2d is false"),
        (["stage_2.params.num_heads=[0,16]"], r"num_heads is \[0, 16\]; expected a whole number above 0"),
        (["stage_2.params.hidden_size=[1152,wide]"], "hidden_size is .*; expected a whole number"),
        (["stage_2.params.depth=-1"], "depth is -1"),
        (["stage_2.params.patch_size=0"], "patch_size is 0"),
        (["stage_2.params.mlp_ratio=big"], "mlp_ratio is 'big'; expected a number above 0"),
        (["stage_2.params.class_dropout_prob=2"], "class_dropout_prob is 2; expected a probability"),
        (["stage_2.params.use_rope=maybe"], "use_rope is 'maybe'; expected true or false"),
    ],
)
def test_contradictions_name_both_keys(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        _geometry(*overrides)


@pytest.mark.parametrize(
    ("encoder_cls", "name", "facts"),
    [
        ("Dinov2withNorm", "facebook/dinov2-with-registers-small", (14, 384)),
        ("DINOv2", "facebook/dinov2-large", (14, 1024)),
        ("Dinov2withNorm", "facebook/dinov2-giant", (14, 1536)),
        ("DINOv3", "facebook/dinov3-vits16-pretrain-lvd1689m", (16, 384)),
        ("Dinov2withNorm", "facebook/dinov3-vitb16-pretrain-lvd1689m", (16, 768)),
        ("DINOv3", "facebook/dinov3-vith16plus-pretrain-lvd1689m", (16, 1280)),
        ("DINOv3", "facebook/dinov3-vit7b16-pretrain-lvd1689m", (16, 4096)),
        ("MAEwNorm", "facebook/vit-mae-huge", (14, 1280)),
        ("MAE", "facebook/vit-mae-large", (16, 1024)),
        ("SigLIP2wNorm", "google/siglip2-so400m-patch14-384", (14, 1152)),
        ("SigLIP2wNorm", "google/siglip2-giant-opt-patch16-256", (16, 1536)),
        ("TimmViT", "vit_giant_patch14_clip_224", (14, None)),
        ("TimmViT", "vit_xsmall_patch16_clip_224", (16, None)),
        ("Dinov2withNorm", "/data/small-models/dinov2-large", (14, 1024)),
    ],
)
def test_sizes_by_published_name(encoder_cls: str, name: str, facts: tuple[int, int | None]) -> None:
    """Only the model's own name counts, and a width that a name does not tell is not guessed."""
    assert encoder_facts(Stage1Params(encoder_cls=encoder_cls, encoder_params={"path": name})) == facts


def test_a_local_encoder_folder_is_read(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"patch_size": 8, "hidden_size": 48}))
    geometry = resolve_geometry(
        load_config(
            None,
            [f"stage_1.params.encoder_params.dinov2_path={tmp_path}", "stage_1.params.encoder_input_size=64",
             "stage_1.params.decoder_patch_size=8"],
        )
    )  # fmt: skip
    assert geometry.latent_shape == (48, 8, 8)
    assert geometry.image_size == 64
    for text, said in (("[]", "holds no mapping"), ("{", "is not JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=said):
            encoder_facts(Stage1Params(encoder_params={"path": str(tmp_path)}))


def test_an_unknown_encoder_without_latent_size_asks_for_it() -> None:
    with pytest.raises(UserError, match=r"misc\.latent_size"):
        resolve_geometry(load_config(None, ["stage_1.params.encoder_cls=TimmViT"]))
