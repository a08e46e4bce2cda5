"""The runs of a report: read from their folders, named by what they are, and grouped by recipe."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgd_timm.pipeline.plan import terms_of
from mgd_timm.pipeline.run_folder import read_recipe
from mgd_timm.pipeline.turns import Turn, turns_of
from mgd_timm.recipe.checks import needs_no_teacher
from mgd_timm.recipe.options import as_dict, digest
from mgd_timm.recipe.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Of the run.
        recipe: Its options.
        summary: Of summary.json.
        epochs: Rows of metrics.jsonl.
        provenance: Of export/recipe.json: digests, versions.
    """

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    epochs: list[dict[str, Any]]
    provenance: dict[str, Any]

    @property
    def is_alone(self) -> bool:
        """Whether the student had neither a teacher nor a peer, did not teach itself, and is no teacher for another."""
        untaught = self.recipe.teacher is None and self.recipe.peer is None and self.recipe.for_student is None
        return untaught and not needs_no_teacher(self.recipe.criterion)

    @property
    def is_kd(self) -> bool:
        """Whether a teacher taught by plain logit KD alone: no sequence of teachers and no trajectory of one, forward
        divergence, samples that count equally."""
        alone = self.recipe.method == "none" and _criteria(self.recipe) == ["kd"] and not _variants(self.recipe)
        fixed = len(turns_of(self.recipe)) == 1 and self.recipe.teacher_trajectory is None
        return self.recipe.teacher is not None and alone and fixed

    @property
    def last_turn(self) -> Turn:
        """The last teacher of a sequence, with the folder of its heads; else all teachers, with the run's."""
        turn = turns_of(self.recipe)[-1]
        return replace(turn, folder=self.folder / turn.folder.relative_to(self.recipe.output))

    def describe(self) -> str:
        """Return what the run is: "alone", "for resnet18", or its method and criteria, such as "KD" or "MAG + AT"."""
        if self.recipe.for_student is not None:
            return f"for {self.recipe.for_student}"
        if self.is_alone:
            return "alone"
        criteria = [name.upper() for name in _criteria(self.recipe)]
        if self.recipe.peer is not None:
            criteria = ["peer", *criteria]
        if self.recipe.method != "none":
            criteria = [self.recipe.method.upper(), *(name for name in criteria if name != "KD")]
        count = len(turns_of(self.recipe))
        how = f", {count} teachers in sequence" if count > 1 else ""
        how = ", teacher's trajectory" if self.recipe.teacher_trajectory is not None else how
        return ", ".join([" + ".join(criteria) + how, *_variants(self.recipe)])


def _variants(recipe: Recipe) -> list[str]:
    """Return what makes a run's KD or its codes another than the plain one, in words."""
    term = terms_of(recipe).active.get("kd")
    divergence = term.options.get("divergence", "forward") if term is not None else "forward"
    found = [f"{divergence} divergence"] if divergence != "forward" else []
    if recipe.method != "none" and recipe.heads.code_divergence != "forward":
        found.append(f"{recipe.heads.code_divergence} divergence of the codes")
    return found + (["samples weighted"] if recipe.sample_weight != "none" else [])


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in the order of the seeds.

    Args:
        label: What they are, distinct among the groups of a report.
        runs: One or more.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run of the lowest seed."""
        return self.runs[0]


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        ValueError: The folder holds no run, one that has not finished, or a corrupt file.
    """
    recipe = read_recipe(folder)
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} is a run that has not finished: continue it with --resume.")
    provenance = folder / "export" / "recipe.json"
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return Run(
        folder,
        recipe,
        _parse(folder / "summary.json", (folder / "summary.json").read_text(encoding="utf-8")),
        [_parse(metrics, line) for line in lines],
        _parse(provenance, provenance.read_text(encoding="utf-8")) if provenance.is_file() else {},
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by recipe without seed: those alone first, then KD, then the others in the given order."""
    by_recipe: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (not run.is_alone, not run.is_kd)):
        by_recipe.setdefault(_recipe_digest(run), []).append(run)
    sets = [tuple(sorted(found, key=lambda run: run.recipe.seed)) for found in by_recipe.values()]
    labels = [found[0].describe() for found in sets]
    if len({run.recipe.student for run in runs}) > 1:
        labels = [f"{found[0].recipe.student}, {label}" for found, label in zip(sets, labels, strict=True)]
    count = Counter(labels)
    return [
        Group(f"{label} ({found[0].folder.name})" if count[label] > 1 else label, found)
        for found, label in zip(sets, labels, strict=True)
    ]


def baseline(groups: Sequence[Group], group: Group, *, kd: bool) -> Group | None:
    """Return the group that another one is compared with: the first of the same student that is alone, or of KD."""
    for other in groups:
        fits = other.first.is_kd if kd else other.first.is_alone
        if fits and other is not group and other.first.recipe.student == group.first.recipe.student:
            return other
    return None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path} is corrupt ({error}): restore it, or leave the run out.") from error
    return values


def _criteria(recipe: Recipe) -> list[str]:
    """Return the names of the criteria: of NAME:WEIGHT:EPOCHS the first word."""
    return [one.partition(":")[0].strip().lower() for one in recipe.criterion]


def _recipe_digest(run: Run) -> str:
    """Return a digest of all that decides a run's weights but the seed. Options count as digested, and the teacher by
    its weights."""
    options = as_dict(replace(run.recipe, seed=0), digest_only=True)
    teacher = run.provenance.get("teacher_sha256", run.recipe.teacher)
    teacher = [teacher, *run.provenance.get("trajectory_sha256", [])]
    return digest([options, teacher, run.provenance.get("data_sha256")])
