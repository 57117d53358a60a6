"""Pages in a real browser, at desktop and phone width: nothing cut off, pictures shown, no script, no network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_fast.evaluation.outcome import Picture, write_outcome
from rae_fast.evaluation.run_report import write_run_report
from rae_fast.provenance import write_json

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# The page in a frame of the width asked for, as a browser's own window has a least width; what it shows, as JSON.
FRAME = """<!doctype html><iframe id="frame" style="width:{width}px;height:900px;border:0" src="{name}"></iframe>
<pre id="found"></pre><script>
document.getElementById("frame").onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement, cut = [];
  for (const element of page.body.querySelectorAll("*")) {{
    const box = element.getBoundingClientRect();
    if (box.right > root.clientWidth + 1 && !element.closest(".scroll")) cut.push(element.tagName);
    if (element.closest(".tile") && element.scrollWidth > element.clientWidth + 1 && element.clientWidth)
      cut.push("inside " + element.tagName);
  }}
  const texts = [...page.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect());
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth, content: root.scrollWidth, height: root.scrollHeight, cut: cut,
    pictures: [...page.images].map((image) => image.complete && image.naturalWidth > 0),
    smallest_text: Math.min(...texts.map((box) => box.height), 99), plots: page.querySelectorAll("svg").length,
  }});
}};
</script>"""


def run_page(folder: Path) -> Path:
    identity = {"encoder": "sha256:" + "0123456789abcdef" * 4, "dataset": "ab" * 32}
    write_json(folder / "manifest.json", {"identity": identity, "ranks": 2, "device": "NVIDIA H200"})
    steps = [{"step": s, "images": 8 * s, "loss": 1 / s, "lr": 1e-4, "grad_norm": 1.5} for s in range(1, 40)]
    (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    speed = {"step": 2, "images_per_s": 51.25, "data_wait": 0.01, "memory_bytes": 2e9}
    (folder / "speed.jsonl").write_text(json.dumps(speed) + "\n")
    (folder / "samples").mkdir()
    Image.new("RGB", (2048, 512), "red").save(folder / "samples/step-0000002.png")
    return write_run_report(folder)


def evaluation_page(folder: Path) -> Path:
    figures = {"fid": 1.5134, "sfid": 5.81, "inception_score": 242.93, "precision": 0.792, "recall": 0.639}
    report = {
        "metrics": {"inception": figures, "encoder": {"fd": 71.25, "mmd": 0.0123}},
        "notes": ["a reference of 10,000 images: figures are not those of 50,000"],
        "samples": {"path": "/data/" + "a-very-long-folder-name/" * 6, "sha256": "0123456789abcdef" * 4},
        "versions": {"torch": "2.14.1"},
    }
    pictures = [Picture("samples", np.full((12, 96, 96, 3), 128, np.uint8), "12 images, evenly spread")]
    write_outcome(folder, report, "How close are these images to those?", "samples against reference", pictures)
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("make", [run_page, evaluation_page])
def test_nothing_is_cut_off(make, width: int, tmp_path: Path) -> None:
    page = make(tmp_path)
    text = page.read_text()
    assert "<script" not in text and re.findall(r"(?:src|href)=\"(?!data:|#)", text) == [], "the page works offline"
    found = look(page, width)
    assert found["width"] <= width and found["content"] <= found["width"], found
    assert found["cut"] == [] and all(found["pictures"]) and found["pictures"], found
    assert found["height"] > 300
    if make is run_page:
        assert found["plots"] >= 2 and found["smallest_text"] >= 5, found


def look(page: Path, width: int) -> dict:
    """What the browser shows of a page in a window of this width."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(width=width, name=page.name))
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={page.parent / 'browser'}", "--window-size=1400,1000", "--virtual-time-budget=5000",
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    inside = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert inside and inside[1], done.stderr[-2000:]
    return json.loads(html.unescape(inside[1]))
