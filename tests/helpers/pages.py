"""README.md, CHANGELOG.md and the pages of docs/, and what is known of the commands that they show."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mgd_timm.cli.main import main
from mgd_timm.cli.parser import run_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MARK = re.compile(r"<!-- not run: .+ -->\n\Z")
"""The line above a block that is not run."""
OF_OTHERS = {
    *("--config_file", "--machine_rank", "--main_process_ip", "--num_machines", "--num_processes"),  # accelerate
    *("--master_addr", "--nproc_per_node", "--rdzv_backend", "--tee", "--logdir"),  # torchrun, tensorboard
}


def commands(source: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments."""
    for line in source.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def call(words: list[str]) -> int:
    """Call the command line in this process, as a new one would take seconds to import torch; gives the exit code."""
    try:
        return main(words)
    except SystemExit as end:  # of --print_config and the like
        return int(end.code or 0)


def check_words(words: list[str]) -> None:
    """Check what can be known of a command without running it: targets of make, files, flags and their values."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), shlex.join(words)
    for word in words:
        if word.startswith(("recipes/", "benchmarks/", "docs/", "tests/")):
            assert (ROOT / word).exists(), word
    start = next((i for i, word in enumerate(words) if word in ("mgd-timm", "mgd_timm")), None)
    if start is not None and words[start + 1] in ("distill", "train"):
        assert call([*words[start + 1 :], "--print_config"]) == 0, shlex.join(words)
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known_flags(), f"{word} of {shlex.join(words)}"


@functools.cache
def known_flags() -> frozenset[str]:
    """Every flag of the command line, of recipes/ and of benchmarks/."""
    found = set(OF_OTHERS)
    for distill in (False, True):
        for action in run_parser("mgd-timm", distill=distill)._actions:
            found.update(action.option_strings)
    for file in (path for folder in ("mgd_timm/cli", "recipes", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")):
        found.update(re.findall(r'"(--[a-z][\w-]+)"', file.read_text()))
        found.update(f"--{name.replace('_', '-')}" for name in re.findall(r'add_flag\("(\w+)"', file.read_text()))
    return frozenset(found | {"--help", "--markdown", "--mean", "--std"})
