from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib

from rae_fast.config import Config
from rae_fast.config_file import to_yaml

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/sampling.ipynb"


def test_every_cell_runs_on_a_run_folder(model_files: Path, config: Config, tmp_path: Path) -> None:
    matplotlib.use("Agg")
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    shutil.copy(model_files / "dit.pt", run / "export/stage2_model.pt")
    cells = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    space: dict[str, object] = {}
    exec(cells[0], space)
    space.update(RUN=str(run), DECODER=str(model_files / "decoder.pt"), LABELS=[0, 1, 2])
    for cell in cells[1:]:
        exec(cell, space)
    assert space["images"].shape == (12, 16, 16, 3)
    assert len(space["latents"]) == 6
