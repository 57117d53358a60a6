"""Draws the demo's dataset: an ImageFolder of JPEGs whose class is a shape, whatever its colour, size and ground.

Every picture is a pure function of (seed, split, index), so that an interrupted drawing goes on where it stopped and
two machines draw the same scenes. Shapes are mirror-symmetric: a horizontal flip never changes the class.

Lengths inside a scene are fractions of the picture's short side; the centre crop keeps every shape whole.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import pi, tau
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rae_fast.errors import UserError
from rae_fast.progress import Progress
from rae_fast.provenance import atomic_write, read_json, write_json

FORMAT = 1
RECORD = "drawing.json"
SPLITS = ("train", "val")

SHORT_SIDE_PX = (72, 160)
ASPECTS = (1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 5 / 4, 4 / 5)
QUALITY = (85, 95)
RADIUS = (0.33, 0.42)
OFFSET = 0.06
TILT_RAD = 0.06
LUMA_CONTRAST = 0.28
SUPERSAMPLING = 3

# One file of each kind that real collections hold, by index in the training split.
ODD_FILES = {5: "grayscale", 14: "cmyk", 23: "rotated", 32: "truncated"}
EXIF_ORIENTATION, TURN_CLOCKWISE_TO_VIEW = 0x0112, 6


@dataclass(frozen=True)
class DrawnDataset:
    """The two ImageFolders of a drawing: `train`, and `val` that no training ever sees."""

    train: Path
    val: Path


@dataclass(frozen=True)
class Drawing:
    """What decides the files of a drawing."""

    images: int
    held_out: int
    seed: int
    format: int = FORMAT


def draw_dataset(
    folder: str | Path, *, images: int = 2400, held_out: int = 320, seed: int = 0, workers: int = 2
) -> DrawnDataset:
    """Draw `folder`/train and `folder`/val, class folders of JPEGs; files that are already there are kept.

    Args:
        images: files in train, the four odd ones among them; classes take turns.
        held_out: files in val.
        seed: any non-negative int.
        workers: threads.

    Raises:
        UserError: the folder cannot be written or holds another drawing.
    """
    folder = Path(folder)
    drawing = Drawing(images, held_out, seed)
    dataset = DrawnDataset(folder / "train", folder / "val")
    if _is_finished(folder, drawing):
        return dataset
    write_json(folder / RECORD, {**asdict(drawing), "finished": False})
    missing = list(_missing_files(folder, drawing))
    progress = Progress(images + held_out, "images", "drawing", done=images + held_out - len(missing))
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda job: _write_picture(*job, seed), missing):
            progress.advance()
    progress.close()
    write_json(folder / RECORD, {**asdict(drawing), "finished": True})
    return dataset


def draw_picture(seed: int, split: str, index: int) -> Image.Image:
    """The RGB picture number `index` of a split; its class is `class_of(index)`."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    width, height = _picture_size(rng)
    ground_color, shape_color = _color_pair(rng)
    ground_HW3 = _ground(rng, width, height, ground_color)
    mask_HW1 = _shape_mask(rng, width, height, OUTLINES[class_of(index)])[..., None]
    shading_HW1 = 1 + np.float32(rng.uniform(-0.15, 0.15)) * _ramp(rng, width, height)[..., None]
    pixels_HW3 = ground_HW3 * (1 - mask_HW1) + shape_color * shading_HW1 * mask_HW1
    grain_HW1 = np.float32(rng.uniform(0, 0.012)) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(np.uint8(np.clip(pixels_HW3 + grain_HW1, 0, 1) * 255 + 0.5))


def class_of(index: int) -> str:
    """The class of picture `index`: classes take turns."""
    return CLASSES[index % len(CLASSES)]


def _is_finished(folder: Path, drawing: Drawing) -> bool:
    record = folder / RECORD
    if not record.exists():
        return False
    found = read_json(record)
    finished = found.pop("finished", False)
    if found != asdict(drawing):
        raise UserError(
            f"{record} describes another drawing, {found}", str(asdict(drawing)), "remove that folder or choose another"
        )
    return finished


def _missing_files(folder: Path, drawing: Drawing) -> Iterator[tuple[Path, str, int]]:
    """(path, split, index) of every file still to draw; leftovers of a killed run are removed."""
    for split, count in zip(SPLITS, (drawing.images, drawing.held_out), strict=True):
        present = set()
        for class_name in CLASSES:
            class_folder = folder / split / class_name
            present |= {path.name for path in class_folder.glob("*.jpg")}
            for leftover in class_folder.glob(".*.part"):
                leftover.unlink()
        for index in range(count):
            odd = ODD_FILES.get(index) if split == "train" else None
            name = f"{index:05d}-{odd}.jpg" if odd else f"{index:05d}.jpg"
            if name not in present:
                yield folder / split / class_of(index) / name, split, index


def _write_picture(path: Path, split: str, index: int, seed: int) -> None:
    picture = draw_picture(seed, split, index)
    odd = ODD_FILES.get(index) if split == "train" else None
    quality = QUALITY[0] + (index * 7 + seed) % (QUALITY[1] - QUALITY[0] + 1)
    with atomic_write(path) as file:
        file.write(_encode_jpeg(picture, quality, odd))


def _encode_jpeg(picture: Image.Image, quality: int, odd: str | None) -> bytes:
    exif = Image.Exif()
    if odd == "grayscale":
        picture = picture.convert("L")
    elif odd == "cmyk":
        picture = picture.convert("CMYK")
    elif odd == "rotated":
        # As a phone held upright stores it: pixels lying on their side, and a note how to turn them.
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[EXIF_ORIENTATION] = TURN_CLOCKWISE_TO_VIEW
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, exif=exif)
    content = buffer.getvalue()
    return content[: len(content) // 2] if odd == "truncated" else content


# ---- scene --------------------------------------------------------------------------------------------------------


def _picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """(width, height) in pixels."""
    short = int(rng.integers(SHORT_SIDE_PX[0], SHORT_SIDE_PX[1] + 1))
    aspect = ASPECTS[rng.integers(len(ASPECTS))]
    return (round(short * aspect), short) if aspect >= 1 else (short, round(short / aspect))


def _color_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(ground, shape) RGB in [0, 1], drawn alike for every class, apart enough in luma to be told in grayscale."""
    while True:
        ground = _color(rng, saturation=(0.1, 0.7), value=(0.2, 0.95))
        shape = _color(rng, saturation=(0.4, 1.0), value=(0.3, 1.0))
        if abs(_luma(ground) - _luma(shape)) >= LUMA_CONTRAST:
            return ground, shape


def _color(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb, dtype=np.float32)


def _luma(color: np.ndarray) -> float:
    """ITU-R BT.601 luma, the one of PIL's grayscale conversion and of JPEG."""
    return float(color @ (0.299, 0.587, 0.114))


def _ground(rng: np.random.Generator, width: int, height: int, color: np.ndarray) -> np.ndarray:
    """A textured ground around `color`, float [H, W, 3]."""
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    tint = np.float32(color * rng.uniform(0.75, 0.9) + rng.uniform(0, 0.08, 3))
    field_HW1 = texture(rng, width, height)[..., None]
    return color + (tint - color) * field_HW1


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (x [1, W], y [H, 1]) in fractions of the short side, the picture's centre at (0, 0)."""
    short = min(width, height)
    x = (np.arange(width) + 0.5 - width / 2) / short
    y = (np.arange(height) + 0.5 - height / 2) / short
    return np.float32(x[None, :]), np.float32(y[:, None])


def _ramp(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A linear slope in a random direction, about -1 to 1 over the short side."""
    x, y = _grid(width, height)
    angle = rng.uniform(0, tau)
    return 2 * (np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y)


def _gradient(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    return 0.5 + 0.5 * _ramp(rng, width, height)


def _stripes(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    frequency, phase = np.float32(rng.uniform(8, 20)), np.float32(rng.uniform(0, tau))
    return 0.5 + 0.5 * np.sin(frequency * _ramp(rng, width, height) + phase)


def _checks(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    x, y = _grid(width, height)
    cells = rng.uniform(3, 6)
    phase_x, phase_y = rng.random(2)
    return ((np.floor(x * cells + phase_x) + np.floor(y * cells + phase_y)) % 2).astype(np.float32)


def _clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    knots = Image.fromarray(np.uint8(rng.integers(0, 256, (5, 5))))
    return np.asarray(knots.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255


TEXTURES: tuple[Callable[[np.random.Generator, int, int], np.ndarray], ...] = (_gradient, _stripes, _checks, _clouds)


# ---- shapes -------------------------------------------------------------------------------------------------------


def _shape_mask(rng: np.random.Generator, width: int, height: int, outline: list[np.ndarray]) -> np.ndarray:
    """Coverage of each pixel by the shape, float [H, W] in [0, 1], edges smoothed."""
    radius = rng.uniform(*RADIUS)
    center = rng.uniform(-OFFSET, OFFSET, 2)
    tilt = rng.uniform(-TILT_RAD, TILT_RAD)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    scale = min(width, height) * SUPERSAMPLING
    middle = np.array([width, height]) * SUPERSAMPLING / 2
    mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    _fill_outline(mask, [points @ turn.T * radius + center for points in outline], scale, middle)
    return np.asarray(mask.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _fill_outline(mask: Image.Image, outline: list[np.ndarray], scale: float, middle: np.ndarray) -> None:
    """Paint the first polygon (points [P, 2]) white and the second, the hole, black."""
    pencil = ImageDraw.Draw(mask)
    for fill, points in zip((255, 0), outline, strict=False):
        pencil.polygon([tuple(corner) for corner in points * scale + middle], fill=fill)


def _polygon(corners: int, radius: float = 1.0) -> np.ndarray:
    """A regular polygon with one corner on top (y points down)."""
    angles = np.arange(corners) * tau / corners - pi / 2
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    points = _polygon(10)
    points[1::2] *= 0.48
    return points


def _cross(arm: float = 0.34) -> np.ndarray:
    quarter = np.array([(arm, -1.0), (arm, -arm), (1.0, -arm)])
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.arange(4) * pi / 2]
    return np.concatenate([quarter @ turn.T for turn in turns])


def _heart() -> np.ndarray:
    """The classic sine-cubed heart, x = 16 sin^3 t, scaled into the unit circle and centred."""
    t = np.linspace(0, tau, 80, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 16


# The first polygon is filled, the second is a hole.
OUTLINES: dict[str, list[np.ndarray]] = {
    "circle": [_polygon(64, 0.92)],
    "cross": [_cross()],
    "diamond": [_polygon(4) * (0.75, 1.0)],
    "heart": [_heart()],
    "ring": [_polygon(64), _polygon(64, 0.55)],
    "square": [np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])],
    "star": [_star()],
    "triangle": [_polygon(3) + np.array((0, 0.15))],
}
CLASSES = tuple(OUTLINES)
