"""Pages say what is: links lead somewhere, files that commands name exist, keys are keys, tables follow the code."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from rae_fast.config_file import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/*.md")]
)
COMMAND = re.compile(r"(?:^|[\s`])((?:\.venv/bin/)?(?:python|deepspeed|torchrun)\s[^\n`]*tools/\w+\.py[^\n`]*)")
# Keys that take what only the reader has.
OPEN_VALUES = ("...", "<", "$")


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page that runs one of our tools, comments and continuations resolved."""
    text = page.read_text().replace("\\\n", " ")
    return [shlex.split(found.split(" #")[0].split("  #")[0]) for found in COMMAND.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_and_keys_that_exist(page: Path) -> None:
    for words in commands(page):
        for word in words:
            if re.fullmatch(r"(tools|configs|benchmarks)/[\w./-]+\.(py|yaml|json)", word):
                assert (ROOT / word).exists(), f"{page.name}: {word}"
        overrides = [w for w in words if re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+=.*", w) and not w.endswith("=")]
        overrides = [w for w in overrides if not any(mark in w for mark in OPEN_VALUES)]
        load_config(None, overrides)


def generator_of(name: str) -> ModuleType:
    """The module that writes a page."""
    specification = importlib.util.spec_from_file_location(f"{name}_page", ROOT / f"docs/{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_configuration_page_follows_the_schema() -> None:
    generator = generator_of("configuration")
    page = generator.page()
    assert generator.PAGE.read_text() == page, "run python docs/configuration.py"
    unexplained = re.findall(r"^\| `([^`]+)` \|[^|]*\|[^|]*\|  \|$", page, re.M)
    assert unexplained == [], "config keys without a comment"


def test_the_page_of_errors_follows_the_code() -> None:
    generator = generator_of("messages")
    assert generator.PAGE.read_text() == generator.page(), "run python docs/messages.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_pages_name_are_keys_of_the_configuration(page: Path) -> None:
    keys = set(re.findall(r"^\| `([^`]+)` \|", generator_of("configuration").page(), re.M))
    sections = {key.split(".")[0] for key in keys if "." in key}
    for named in re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:[=:] ?[^`]*)?`", page.read_text()):
        if named.split(".")[0] in sections and not named.endswith((".py", ".md", ".json", ".jsonl", ".yaml")):
            # Free mappings, as encoder_params, take what the encoder takes.
            known = named in keys or any(key.startswith(f"{named}.") for key in keys)
            assert known or any(named.startswith(f"{key}.") for key in keys), f"{page.name}: {named}"


def test_folders_of_the_architecture_page_are_those_on_disk() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = text[text.index("| folder of `rae_fast/`") :].split("\n\n")[0]
    named = re.findall(r"`([\w./]+)`", "\n".join(line.split(" | ")[0] for line in table.splitlines()[2:]))
    folders = {f"{file.parent.name}/" for file in (ROOT / "rae_fast").glob("*/__init__.py")}
    files = {file.name for file in (ROOT / "rae_fast").glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(folders | files)
