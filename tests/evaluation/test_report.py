import json
import re
from html.parser import HTMLParser

from PIL import Image

from rae_fast.evaluation.report import Page, column, read_log, readable_bytes


class _Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def _page() -> Page:
    page = Page("Title <b>", "lead & more")
    page.heading("Facts")
    page.tiles({"PSNR": "24.1 dB"})
    page.facts({"store": "a/b", "images": 12})
    page.table(("stage", "seconds"), [("cache", 1.25), ("<script>", 3)])
    page.image(Image.new("RGB", (4, 4), "red"), "a red square", pixels=True)
    page.curves({"loss": ([1, 2, 3], [0.5, 0.4, 0.3]), "empty": ([], [])}, "step", "loss")
    return page


def test_a_page_holds_all_it_shows_and_escapes_what_it_is_given(tmp_path) -> None:
    _page().save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    resources = _Resources()
    resources.feed(text)
    assert resources.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in resources.links)
    assert "<script>" not in text
    assert "Title &lt;b&gt;" in text
    assert "<svg" in text
    assert re.search(r'class="number">1\.25<', text)


def test_the_same_content_gives_the_same_bytes(tmp_path) -> None:
    _page().save(tmp_path / "a.html")
    _page().save(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_torn_last_line_of_a_log_is_left_out(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        json.dumps({"step": 1, "loss": 2.0}) + "\n" + json.dumps({"step": 2, "lr": 1.0}) + '\n{"step": 3, "lo'
    )
    records = read_log(path)
    assert len(records) == 2
    assert column(records, "step", "loss") == ([1], [2.0])
    assert read_log(tmp_path / "none.jsonl") == []


def test_bytes_are_readable() -> None:
    assert [readable_bytes(n) for n in (999, 1500, 2.5e9)] == ["999 B", "1.5 kB", "2.5 GB"]
