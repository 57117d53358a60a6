"""Turns benchmarks/results/*.json into one page, with DESIGN's targets beside what was measured, and what was not.

python benchmarks/report.py             # writes benchmarks/results/REPORT.md and a plot for each result
python benchmarks/report.py --readme    # also rewrites the README's figures, between their two comments
python benchmarks/report.py --check     # exit status 1 where the README's figures are not those of the results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_file import RESULTS, validate_result

from rae_fast.errors import UserError, exit_cleanly
from rae_fast.provenance import atomic_write, read_json

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- figures: written by benchmarks/report.py --readme -->"
END = "<!-- end of figures -->"
UNMEASURED = "unmeasured"
HIDDEN = ("rows", "points", "drift", "versions")  # too long for a page
Results = dict[str, dict[str, Any]]  # file stem -> result


@dataclass(frozen=True)
class Target:
    """One promise of DESIGN section 10, or of the issue that asked for a benchmark.

    Attributes:
        what: in words.
        target: in words.
        needed: the least figure that keeps it, or the largest where `at_most`; None: nothing was promised.
        unit: of the figure.
        measure: the figure, or None where nothing has been measured.
        at_most: smaller is better.
        headline: belongs into the README.
    """

    what: str
    target: str
    needed: float | None
    unit: str
    measure: Callable[[Results], float | None]
    at_most: bool = False
    headline: bool = False

    def state(self, results: Results) -> tuple[str, str]:
        """(measured, verdict) as texts."""
        figure = self.measure(results)
        if figure is None:
            return UNMEASURED, "-"
        measured = f"{figure:.3g} {self.unit}".strip()
        if self.needed is None:
            return measured, "-"
        kept = figure <= self.needed if self.at_most else figure >= self.needed
        return measured, "reached" if kept else "not reached"


# --- what a figure is read from -------------------------------------------------------------------------------------


def of_row(benchmark: str, name: str, key: str = "median") -> Callable[[Results], float | None]:
    """A number of the row of this name, in the newest result of a benchmark."""

    def measure(results: Results) -> float | None:
        for result in newest_first(results, benchmark):
            for entry in result["rows"]:
                if entry["name"] == name and isinstance(entry.get(key), int | float):
                    return float(entry[key])
        return None

    return measure


def busy_share(name: str) -> Callable[[Results], float | None]:
    """Rate beside a busy thread over the idle one."""

    def measure(results: Results) -> float | None:
        pair = [of_row("store-busy", f"{name}, {state}")(results) for state in ("busy", "idle")]
        return pair[0] / pair[1] if pair[0] is not None and pair[1] else None

    return measure


def best_rate(model: str, tokens: int, device: str = "H200") -> Callable[[Results], float | None]:
    """The fastest of our training steps on such a device."""

    def measure(results: Results) -> float | None:
        rates = [entry["median"] for result in steps(results, model, tokens, device) for entry in ours(result)]
        return max(rates, default=None)

    return measure


def over_reference(word: str, model: str = "DiTDH-XL", device: str = "H200") -> Callable[[Results], float | None]:
    """The fastest of our steps over the reference's row whose name has this word."""

    def measure(results: Results) -> float | None:
        ratios = []
        for result in steps(results, model, 256, device):
            theirs = [e["median"] for e in result["rows"] if e["name"].startswith("reference") and word in e["name"]]
            best = max((entry["median"] for entry in ours(result)), default=None)
            ratios += [best / max(theirs)] if theirs and best else []
        return max(ratios, default=None)

    return measure


def steps(results: Results, model: str, tokens: int, device: str) -> list[dict[str, Any]]:
    """Results of train_step.py for this model on this device."""
    found = newest_first(results, "train_step")
    return [r for r in found if device in r["device"] and r.get("model") == model and r.get("tokens", 256) == tokens]


def ours(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows in images/s that are not the reference's."""
    return [e for e in result["rows"] if e["unit"] == "images/s" and not e["name"].startswith("reference")]


def worst_kernel(results: Results) -> float | None:
    """The lowest share of copy bandwidth among our kernels' rows that say what they moved."""
    shares = []
    for result in newest_first(results, "kernels"):
        copy = (result.get("ceilings") or {}).get("copy_tb_s")
        moved = [e["achieved_tB_s"] for e in result["rows"] if e["name"].endswith("/ kernel") and "achieved_tB_s" in e]
        shares += [rate / copy for rate in moved] if copy else []
    return min(shares, default=None)


def attention_gain(results: Results) -> float | None:
    """cuDNN's time over ours: N = 256, D = 72, with rotation, forward and backward."""
    for result in newest_first(results, "kernels"):
        medians = {e["name"].split(" / ")[1]: e["median"] for e in result["rows"] if is_trunk_attention(e["name"])}
        if {"kernel", "compiled, cudnn"} <= medians.keys():
            return medians["compiled, cudnn"] / medians["kernel"]
    return None


def is_trunk_attention(name: str) -> bool:
    """Whether a row of kernels.py is the one that the target speaks of."""
    return name.startswith("attention ") and " N=256 D=72 forward+backward / " in name


def data_wait(results: Results) -> float | None:
    """Percent of a DiTDH-XL step on an H200 that its data is waited for; the largest of our steps on real data."""
    waits = []
    for result in steps(results, "DiTDH-XL", 256, "H200"):
        milliseconds = {e["name"]: e["median"] for e in result["rows"] if e["unit"] == "ms"}
        for entry in ours(result):
            wait = milliseconds.get(f"{entry['name']}: data wait")
            if wait is not None:
                waits.append(100 * wait * entry["median"] / (1e3 * entry["batch"]))
    return max(waits, default=None)


def newest_first(results: Results, benchmark: str) -> list[dict[str, Any]]:
    """Results of one benchmark."""
    found = [result for result in results.values() if result["benchmark"] == benchmark]
    return sorted(found, key=lambda result: result["date"], reverse=True)


def summary(model: str, key: str) -> Callable[[Results], float | None]:
    """A figure of end_to_end.py's summary on a CPU."""

    def measure(results: Results) -> float | None:
        for result in newest_first(results, "end_to_end"):
            figure = result.get("summary", {}).get(model, {}).get(key)
            if figure is not None and result["device"] == "CPU":
                return float(figure)
        return None

    return measure


def simulation_error(results: Results) -> float | None:
    """The largest deviation of a simulated step from the measured one, in percent."""
    ratios = [e["of_measured"] for r in newest_first(results, "simulate")[:1] for e in r["rows"] if "of_measured" in e]
    return max((100 * abs(ratio - 1) for ratio in ratios), default=None)


def planner_error(results: Results) -> float | None:
    """The largest deviation of a planned step from the measured one, in percent."""
    found = newest_first(results, "planner")[:1]
    ratios = [e["predicted_over_measured"] for r in found for e in r["rows"] if "predicted_over_measured" in e]
    return max((100 * abs(ratio - 1) for ratio in ratios), default=None)


TARGETS = (
    Target("DiTDH-XL, 256 tokens, one H200, bf16 step", ">= 550 images/s", 550, "images/s", best_rate("DiTDH-XL", 256)),
    Target("DiTDH-S, 256 tokens, one H200", ">= 1,870 images/s", 1870, "images/s", best_rate("DiTDH-S", 256)),
    Target("DiTDH-XL, 1024 tokens, one H200", ">= 117 images/s", 117, "images/s", best_rate("DiTDH-XL", 1024)),
    Target("against the reference's TF32 step, H200", ">= 3x", 3, "x", over_reference("TF32")),
    Target("against the reference's bf16 + compile step, H200", ">= 1.7x", 1.7, "x", over_reference("bf16")),
    Target("attention N = 256, D = 72, with rotation, over cuDNN", ">= 1.3x", 1.3, "x", attention_gain),
    Target("data wait of a DiTDH-XL step, H200", "< 1 %", 1, "%", data_wait, at_most=True),
    Target("memory-bound kernels, share of copy bandwidth", ">= 0.85", 0.85, "", worst_kernel),
    Target(
        "loader warm, one core, buffered, over numpy memmap",
        ">= 0.85x",
        0.85,
        "x",
        of_row("store-warm", "native buffered, verified", "ratio"),
        headline=True,
    ),
    Target(
        "loader warm, one core, mapped, over numpy memmap",
        ">= 1.4x",
        1.4,
        "x",
        of_row("store-warm", "native mapped, verified", "ratio"),
        headline=True,
    ),
    Target(
        "loader cold, verified, over a bare O_DIRECT loop",
        ">= 0.9x",
        0.9,
        "x",
        of_row("store-cold", "native direct, verified", "ratio"),
        headline=True,
    ),
    Target(
        "loader cold, verified, CPU seconds for 1000 samples",
        "<= 0.05",
        0.05,
        "s",
        of_row("store-cold", "native direct, verified", "cpu_s_per_1000"),
        at_most=True,
    ),
    Target("loader beside a busy Python thread, of idle", ">= 0.7", 0.7, "", busy_share("native mapped, verified")),
    Target(
        "decode and crop over PIL + DataLoader, CPU",
        ">= 2x",
        2,
        "x",
        of_row("decode", "exact", "ratio_to_baseline"),
        headline=True,
    ),
    Target(
        "cached over the reference's way, steady images/s, S-like width, CPU",
        ">= 5x",
        5,
        "x",
        summary("S-like", "cached_over_reference"),
        headline=True,
    ),
    Target(
        "the most that it could be there: decoding, encoding and training over training alone",
        "-",
        None,
        "x",
        summary("S-like", "cached_at_most"),
        headline=True,
    ),
    Target(
        "the cache has paid for itself, S-like width, CPU",
        "before epoch 2",
        2,
        "epochs",
        summary("S-like", "break_even_epoch"),
        at_most=True,
        headline=True,
    ),
    Target(
        "cached over the reference's way, XL-like width, CPU",
        "-",
        None,
        "x",
        summary("XL-like", "cached_over_reference"),
        headline=True,
    ),
    Target(
        "planned against measured training step, CPU",
        "within 15 %",
        15,
        "%",
        planner_error,
        at_most=True,
        headline=True,
    ),
    Target(
        "simulated against measured steps, 1, 2, 4 ranks (object store on shared cores left out)",
        "within 15 %",
        15,
        "%",
        simulation_error,
        at_most=True,
    ),
)


# --- the page -------------------------------------------------------------------------------------------------------


def load_results(folder: Path) -> Results:
    """All results of a folder, checked.

    Raises:
        UserError: one is not in the common form.
    """
    results = {}
    for file in sorted(folder.glob("*.json")):
        results[file.stem] = read_json(file)
        try:
            validate_result(results[file.stem])
        except ValueError as error:
            raise UserError(f"{file}: {error}", "a result in the common form") from error
    return results


def page(results: Results, folder: Path) -> str:
    """The report as Markdown."""
    lines = ["# Benchmarks", "", "Written by `benchmarks/report.py` from the JSON files beside it.", ""]
    lines += ["## Targets", "", *table(("what", "target", "measured", "verdict"), target_rows(TARGETS, results)), ""]
    missing = [target.what for target in TARGETS if target.measure(results) is None]
    lines += ["Unmeasured: " + ("; ".join(missing) or "nothing") + ".", ""]
    for stem, result in results.items():
        lines += section(stem, result, [f for f in (f"{stem}.png", f"{stem}-bars.png") if (folder / f).exists()])
    return "\n".join(lines).rstrip() + "\n"


def target_rows(targets: Iterable[Target], results: Results) -> list[tuple[str, ...]]:
    """One row for each target."""
    return [(target.what, target.target, *target.state(results)) for target in targets]


def section(stem: str, result: dict[str, Any], plots: Sequence[str]) -> list[str]:
    """One result: where, with what, and its rows."""
    baseline = next(entry for entry in result["rows"] if entry["name"] == result["baseline"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['device']}; {result['cpu']}; {result['date']}, commit {result['commit']}"
    rows = []
    for entry in result["rows"]:
        share = (
            f"{entry['median'] / baseline['median']:.2f}x"
            if baseline["median"] and entry["unit"] == baseline["unit"]
            else ""
        )
        figures = (f"{entry[key]:.4g}" for key in ("median", "p10", "p90"))
        rows.append((entry["name"], *figures, entry["unit"], share, str(entry["n"])))
    head = ("", "median", "p10", "p90", "unit", "of baseline", "n")
    shown = {key: value for key, value in result.items() if key not in HIDDEN and not isinstance(value, str)}
    facts = [f"Settings: `{json.dumps(shown)}`", ""] if shown else []
    pictures = [line for plot in plots for line in (f"![{plot}]({plot})", "")]
    intro = [f"## {stem}", "", result["question"], "", f"{where}; {versions}.", ""]
    return [*intro, *table(head, rows), "", *facts, *pictures]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in cells]


def plot_bars(stem: str, result: dict[str, Any], folder: Path) -> None:
    """Medians as bars with their quantiles, one panel for each unit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    units = list(dict.fromkeys(entry["unit"] for entry in result["rows"]))
    heights = [sum(entry["unit"] == unit for entry in result["rows"]) for unit in units]
    figure, axes = pyplot.subplots(
        len(units), 1, figsize=(8, 0.8 * len(units) + 0.28 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, unit in zip(axes[:, 0], units, strict=True):
        entries = [entry for entry in result["rows"] if entry["unit"] == unit][::-1]
        medians = [entry["median"] for entry in entries]
        errors = [[e["median"] - e["p10"] for e in entries], [e["p90"] - e["median"] for e in entries]]
        colors = ["tab:gray" if entry["name"] == result["baseline"] else "tab:blue" for entry in entries]
        axis.barh([entry["name"] for entry in entries], medians, xerr=errors, color=colors, capsize=2)
        axis.set_xlabel(unit)
        axis.tick_params(labelsize=7)
    figure.suptitle(result["question"], fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"{stem}-bars.png", dpi=110)
    pyplot.close(figure)


# --- the README -----------------------------------------------------------------------------------------------------


def readme_block(results: Results) -> str:
    """The README's figures: headlines that were measured, and on what."""
    targets = [target for target in TARGETS if target.headline and target.measure(results) is not None]
    rows = [(target.what, target.state(results)[0], target.target) for target in targets]
    machines = sorted({f"{result['device']} ({result['cpu']})" for result in results.values()})
    unmeasured = statistics_of_missing(results)
    lines = [BEGIN, *table(("what", "measured", "target"), rows), "", f"Measured on: {'; '.join(machines) or '-'}. "]
    lines[-1] += f"{unmeasured} All figures: [benchmarks/results/REPORT.md](benchmarks/results/REPORT.md)."
    return "\n".join([*lines, END])


def statistics_of_missing(results: Results) -> str:
    """How many targets nobody has measured yet."""
    missing = sum(target.measure(results) is None for target in TARGETS)
    return f"Of {len(TARGETS)} targets {missing} are unmeasured."


def with_block(text: str, block: str) -> str:
    """The README with its figures replaced.

    Raises:
        UserError: the two comments are not in it.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError("README.md has no place for the figures", f"the lines {BEGIN} and {END}", "put them in once")
    before, rest = text.split(BEGIN)
    return before + block + rest.split(END)[1]


def main() -> int:
    """Write the page; rewrite or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true", help="rewrite the README's figures")
    parser.add_argument("--check", action="store_true", help="only compare the README's figures with the results")
    parser.add_argument("--readme-file", type=Path, default=README, help=argparse.SUPPRESS)
    args = parser.parse_args()
    results = load_results(args.results)
    if args.check:
        text = args.readme_file.read_text()
        if with_block(text, readme_block(results)) != text:
            print("README.md has other figures than the results: run benchmarks/report.py --readme", file=sys.stderr)
            return 1
        return 0
    if not results:
        raise UserError(f"{args.results} holds no results", "JSON files of the benchmarks", "run make bench")
    for stem, result in results.items():
        plot_bars(stem, result, args.results)
    with atomic_write(args.results / "REPORT.md", "w") as file:
        file.write(page(results, args.results))
    print("\n".join(table(("what", "target", "measured", "verdict"), target_rows(TARGETS, results))))
    print(f"{args.results / 'REPORT.md'}: {len(results)} results")
    if args.readme:
        text = with_block(args.readme_file.read_text(), readme_block(results))
        with atomic_write(args.readme_file, "w") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
