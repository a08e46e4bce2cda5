"""Every command and snippet of README.md and docs/ is run, or is marked with the reason why it cannot be.

A mark is a comment on the line above a block: `<!-- not run: needs two GPUs -->`. The flags of a marked command are
checked all the same. The blocks of a page are run in their order, in a folder with photos/, the images that the
quickstart writes; all pages but README.md also find its runs/teacher and runs/student.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import MARK, PAGES, ROOT, call, check_words, commands
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from mgd_timm.criteria import CRITERIA

pytestmark = pytest.mark.slow

QUICKSTART = ROOT / "docs" / "quickstart.md"


def marked(example: Example) -> bool:
    return MARK.search(example.document.text[: example.start]) is not None


def run_shell(example: Example) -> None:
    for words in commands(example.parsed):
        if marked(example):
            check_words(words)
        elif words[0] == "mgd-timm":
            assert call(words[1:]) == 0, shlex.join(words)
        elif words[0] == "python" and words[1].endswith(".py"):
            run_script(words[1:])
        else:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
            line = " ".join(word if "=" in word else shlex.quote(word) for word in words)
            subprocess.run(["bash", "-c", line], check=True, env=environment, timeout=300)


def run_script(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str(Path(words[0]).resolve().parent))
        code: object = 0
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert not code, shlex.join(words)


def run_python(example: Example) -> None:
    if marked(example):
        compile(example.parsed, example.path, "exec")
    else:
        PythonEvaluator()(example)


def read_yaml(example: Example) -> None:
    assert yaml.safe_load(example.parsed) is not None


SYBIL = Sybil(
    [CodeBlockParser("bash", run_shell), CodeBlockParser("python", run_python), CodeBlockParser("yaml", read_yaml)]
)


def follow(page: Path, folder: Path) -> None:
    """Run the blocks of a page in a folder, with the repository's scripts beside them."""
    for name in ("recipes", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    before = dict(CRITERIA)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for example in SYBIL.parse(page).examples():
            try:
                example.evaluate()
            except BaseException as error:
                error.add_note(f"{page.relative_to(ROOT)}, line {example.line}")
                raise
            finally:
                CRITERIA.clear()
                CRITERIA.update(before)


@pytest.fixture(scope="session")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart was followed."""
    folder = tmp_path_factory.mktemp("quickstart")
    follow(QUICKSTART, folder)
    return folder


def test_the_quickstart_runs(followed: Path) -> None:
    assert (followed / "students" / "mine" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page != QUICKSTART], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, followed: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to(followed / "photos")
    if page.name != "README.md":
        for name in ("teacher", "student"):
            shutil.copytree(followed / "runs" / name, tmp_path / "runs" / name)
    follow(page, tmp_path)
