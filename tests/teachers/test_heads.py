"""Heads on stored teacher outputs and live, found again by what made them, and warned of when they are bad."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mgd_timm.data.dataset import load_images
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.plan import accelerator_of, classifier_fit_of, context_of, fix_global_batch
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.classifier import fit_classifiers
from mgd_timm.teachers.heads import fit_heads
from mgd_timm.teachers.outputs.memory import store_outputs

pytestmark = pytest.mark.slow


@pytest.fixture
def parts(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))
    options = {
        "data_dir": str(small_data),
        "output": str(tmp_path / "run"),
        "heads_epochs": 8,
        "heads_augmentations": 2,
    }
    recipe = make_recipe(**options, heads_batch_size=64)
    accelerator = accelerator_of(recipe)
    recipe = fix_global_batch(recipe, accelerator)
    (tmp_path / "run").mkdir()
    images = load_images(recipe.data, recipe.seed)
    teacher = Teacher(FeatureTap(load_model("embedded"), input_size=images.input_size))
    return recipe, accelerator, images, teacher


def test_stored_rows_are_what_the_teacher_shows_of_each_view(parts):
    _, accelerator, images, teacher = parts
    stored = store_outputs(lambda batch: teacher(batch.images), images.train, 2, accelerator, 50, quiet=True)
    assert len(stored.ids) == 2 * len(images.train.ids)
    for view in (0, 1):
        ids = images.train.ids[7:19]
        live = next(images.train.batches([ids], view, torch.device("cpu")))
        batch = next(stored.batches([torch.arange(7, 19) + view * len(images.train.ids)], 5, torch.device("cpu")))
        shown = stored.features(batch)
        torch.testing.assert_close(shown.logits, teacher(live.images).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shown.embedding, teacher(live.images).embedding, rtol=1e-4, atol=1e-4)
        assert torch.equal(batch.labels, live.labels)


class Greedy(Teacher):
    """Asks for more memory than any machine has where it is shown more than 16 images."""

    def forward(self, images):
        if len(images) > 16:
            torch.empty(2**58)
        return super().forward(images)


def test_an_error_of_memory_names_the_flag_of_this_stage(parts):
    recipe, accelerator, images, teacher = parts
    recipe = replace(
        recipe, heads=replace(recipe.heads, heads_protocol="live"), data=replace(recipe.data, validation_batch_size=16)
    )
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        fit_heads(Greedy(teacher.tap), recipe.heads, context_of(recipe, images, accelerator, quiet=True))
    assert caught.value.__notes__ == ["heads: give a smaller --heads-batch-size."]


class GreedyLinear(torch.nn.Linear):
    """As Greedy, a classifier."""

    def forward(self, embedding):
        if len(embedding) > 16:
            torch.empty(2**58)
        return super().forward(embedding)


def test_an_error_of_memory_in_a_probe_names_the_same_flag(parts):
    recipe, accelerator, images, _ = parts
    recipe = replace(recipe, fit_teacher_head="probe", data=replace(recipe.data, validation_batch_size=16))
    model = load_model("embedded")
    model.fc = GreedyLinear(model.fc.in_features, model.fc.out_features)
    teacher = Teacher(FeatureTap(model, input_size=images.input_size))
    context = context_of(recipe, images, accelerator, quiet=True)
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        fit_classifiers([teacher], classifier_fit_of(recipe), context)
    assert caught.value.__notes__ == ["teacher_head: give a smaller --heads-batch-size."]


@pytest.mark.parametrize("protocol", ["stored", "live"])
def test_heads_learn_from_both_protocols_and_the_teacher_stays_bitwise(parts, protocol):
    recipe, accelerator, images, teacher = parts
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    recipe = replace(recipe, heads=replace(recipe.heads, heads_protocol=protocol, heads_epochs=40))
    fitted = fit_heads(teacher, recipe.heads, context_of(recipe, images, accelerator, quiet=True))
    heads, found = fitted.heads, fitted.metrics
    assert set(found) == {"teacher", "abstract", "detailed", "top1"}
    assert min(found.values()) > found["teacher"] - 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert set(heads.encoders) == set(heads.decoders) == {"abstract", "detailed"}
    rows = [json.loads(line) for line in Path(recipe.output, "heads", "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == (20 if protocol == "stored" else 40)
    assert rows[-1]["train"]["abstract"] < rows[0]["train"]["abstract"]


@pytest.mark.parametrize(("views", "rows"), [(1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("milestones", [None, (4, 6)])
def test_multistep_decays_at_the_same_shares_whatever_the_augmentations(parts, views, rows, milestones):
    """8 passes, at half and three quarters: the last epoch of all is beyond both."""
    recipe, accelerator, images, teacher = parts
    heads = replace(recipe.heads, heads_sched="multistep", heads_augmentations=views, heads_decay_milestones=milestones)
    fit_heads(teacher, heads, context_of(recipe, images, accelerator, quiet=True))
    found = [json.loads(line)["lr"] for line in Path(recipe.output, "heads", "metrics.jsonl").read_text().splitlines()]
    tenths = [round(-math.log10(lr / 0.02)) for lr in found]
    # A row has the rate of its epoch's last update, which timm lowers one early.
    assert tenths == {1: [0, 0, 0, 1, 1, 2, 2, 2], 2: [0, 1, 2, 2], 4: [1, 2]}[views]
    assert len(found) == rows


def test_heads_are_found_again_only_where_all_that_made_them_is_the_same(parts, capsys):
    recipe, accelerator, images, teacher = parts

    def fitted(recipe, teacher=teacher) -> tuple[dict, bool]:
        capsys.readouterr()
        heads = fit_heads(teacher, recipe.heads, context_of(recipe, images, accelerator, quiet=True)).heads
        return heads.state_dict(), "loaded from the cache" in capsys.readouterr().out

    first, again = fitted(recipe)
    assert not again
    second, again = fitted(recipe)
    assert again
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert fitted(replace(recipe, heads=replace(recipe.heads, abstract_weight=3.0)))[1]  # weights belong to the student
    assert not fitted(replace(recipe, heads=replace(recipe.heads, heads_lr=0.05)))[1]
    assert not fitted(replace(recipe, seed=recipe.seed + 1))[1]
    changed = load_model("embedded")
    with torch.no_grad():
        next(changed.parameters()).flatten()[0] += 1e-3
    assert not fitted(recipe, Teacher(FeatureTap(changed, input_size=images.input_size)))[1]


def test_a_head_far_below_the_teacher_is_warned_of(parts, capsys):
    recipe, accelerator, images, teacher = parts
    hopeless = replace(recipe, heads=replace(recipe.heads, heads_lr=1e-9, heads_epochs=1))
    fit_heads(teacher, hopeless.heads, context_of(hopeless, images, accelerator, quiet=True))
    out = capsys.readouterr().out
    assert "warning: the head 'abstract' is" in out
    assert "points below the teacher: raise --heads-epochs, --heads-augmentations or its dim" in out
