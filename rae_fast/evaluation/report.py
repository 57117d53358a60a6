"""Self-contained HTML pages: facts, tables, pictures and curves in one file that opens offline."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from rae_fast.provenance import atomic_write

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 0 auto; max-width: 1080px;
       padding: 24px 20px 64px; overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid #dde3ea; }
p.lead { color: #51606f; margin: 0 0 16px; }
figure { margin: 16px 0; }
figcaption { color: #51606f; font-size: 14px; }
img, svg { max-width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid #eef1f4; vertical-align: top; }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { border: 1px solid #dde3ea; border-radius: 8px; padding: 10px 16px; min-width: 130px; }
.tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.tile span { color: #51606f; font-size: 13px; }
"""


class Page:
    """An HTML page that is built from top to bottom and saved in one piece."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def tiles(self, figures: Mapping[str, str]) -> None:
        """The few figures that matter, large: caption -> value."""
        cells = "".join(
            f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(caption)}</span></div>'
            for caption, value in figures.items()
        )
        self._parts.append(f'<div class="tiles">{cells}</div>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """A table of two columns: name and value."""
        self.table((), [(name, str(value)) for name, value in facts.items()])

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table; numbers are set flush right."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="scroll"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>')

    def image(self, picture: Image.Image | Path, caption: str, *, pixels: bool = False) -> None:
        """A picture with its caption; `pixels` keeps small images sharp when the browser enlarges them."""
        picture = Image.open(picture) if isinstance(picture, Path) else picture
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        source = base64.b64encode(buffer.getvalue()).decode()
        kind = ' class="pixels"' if pixels else ""
        self._parts.append(
            f'<figure><img{kind} alt="{html.escape(caption)}" width="{picture.width}" height="{picture.height}" '
            f'src="data:image/png;base64,{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )

    def curves(self, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> None:
        """Line plot as inline SVG; `series` maps a name to its x and y values; empty series are left out."""
        series = {name: values for name, values in series.items() if len(values[0])}
        if series:
            self._parts.append(f"<figure>{_plot(series, x, y)}</figure>")

    def save(self, path: str | Path) -> None:
        """Write the page, atomically."""
        with atomic_write(path, "w") as file:
            file.write(
                '<!doctype html><html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head>"
                f"<body>{''.join(self._parts)}</body></html>\n"
            )


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The records of a run's log.jsonl; a line cut short by a crash is left out."""
    path = Path(path)
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # only the last line can be torn, and nothing follows it
    return records


def column(records: Iterable[Mapping[str, float]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The (x, y) values of all records that hold both."""
    pairs = [(record[x], record[y]) for record in records if record.get(x) is not None and record.get(y) is not None]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def readable_bytes(size: float) -> str:
    """`12.3 MB`, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _cell(cell: object) -> str:
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        shown = f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}"
        return f'<td class="number">{shown}</td>'
    return f"<td>{html.escape(str(cell))}</td>"


def _plot(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Fixed ids: the same data give the same page.
    with pyplot.rc_context({"svg.hashsalt": "rae_fast", "svg.fonttype": "none", "font.size": 11}):
        figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
        for name, (xs, ys) in series.items():
            axes.plot(xs, ys, label=name, linewidth=1.4)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
