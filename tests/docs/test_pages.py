"""What pages name exists: links, files, flags; what they count is counted; Sphinx builds them without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, known_flags
from sybil import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from mgd_timm.criteria import CRITERIA

RUN = {"bash", "python", "yaml"}
SHOWN = {"text", "{toctree}", "{eval-rst}", "{include} ../CHANGELOG.md"}
"""Languages of blocks in which there is nothing to run."""


def prose(page: Path) -> str:
    """A page without its blocks and comments."""
    return re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_names_a_language_that_is_run_or_shown(page: Path) -> None:
    document = Document(page.read_text(), str(page))
    for region in FencedCodeBlockLexer(language=".*")(document):
        assert region.lexemes["language"] in RUN | SHOWN, document.line_column(region.start)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_in_a_sentence_exists(page: Path) -> None:
    named = {
        flag for code in re.findall(r"`([^`]+)`", prose(page)) for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", code)
    }
    assert not named - known_flags()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_every_link_and_file_that_a_page_names_exists(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        target = link.partition("#")[0]
        assert not target or "://" in target or (page.parent / target).exists(), link
    for name in re.findall(r"`((?:mgd_timm|recipes|benchmarks|docs|tests)/[\w./-]*)`", prose(page)):
        assert name.startswith("docs/_build") or (ROOT / name).exists(), name


def test_the_readme_is_short_and_counts_what_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    hosts = len(CRITERIA) - 1  # all but the task
    for words in (f"any of {hosts} others", f"{hosts} hosts", f"{len(CRITERIA)} criteria"):
        assert words in " ".join(text.split()), words


def test_the_changelog_starts_with_what_is_not_released_yet() -> None:
    assert re.match(r"# Changelog\n\n## \S+ \(unreleased\)\n", (ROOT / "CHANGELOG.md").read_text())


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    words = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-d", tmp_path / "state"]
    done = subprocess.run(
        [sys.executable, *words, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "site" / "api.html").read_text()
    for name in ("distill", "FeatureTap", "GranularityHeads", "MutualLearning"):
        assert name in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "draw.py", "--output", tmp_path / "mgd.svg"], check=True)
    assert "<svg" in (tmp_path / "mgd.svg").read_text()
    assert (ROOT / "docs" / "images" / "mgd.svg").is_file()
