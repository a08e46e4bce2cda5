"""Self-distillation: both forms against loops, what learns from what, and recipes without a teacher."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import BATCH, CLASSES, PAIR, batch, features
from cases_logits import loop_selfkd

from mgd_timm.criteria import CRITERIA
from mgd_timm.criteria.selfkd import SelfKD
from mgd_timm.pipeline.plan import objective_of, terms_of
from mgd_timm.recipe.checks import needs_no_teacher
from mgd_timm.recipe.recipe import config_values, make_recipe
from mgd_timm.report.runs import Run

ALONE = {"teacher": None, "method": "none"}


def built(**options) -> SelfKD:
    torch.manual_seed(0)
    return SelfKD(PAIR, **options).double()


@pytest.mark.parametrize("form", ["fused", "byot"])
def test_both_forms_on_distributions_against_loops(form):
    mixed = torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown = batch(mixed / mixed.sum(1, keepdim=True))
    student, criterion = features(PAIR.student, 1), built(form=form)
    expected = loop_selfkd(criterion, student, student, shown)
    assert criterion(student, student, shown).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["fused", "byot"])
def test_who_teaches_learns_nothing_from_those_that_it_teaches(form):
    """The divergences alone: the fused head gets no gradient, and of form=byot the classifier neither."""
    student = features(PAIR.student, 1, grad=True)
    one, other = built(form=form, kd=1.0, hint=0.0), built(form=form, kd=3.0, hint=0.0)
    (other(student, student, batch()) - one(student, student, batch())).backward()
    assert (student.logits.grad is None) is (form == "byot")
    assert student.embedding.grad is None or not student.embedding.grad.abs().max() > 1e-12
    assert other.heads[0].weight.grad.abs().max() > 1e-8
    if other.fused is not None:
        torch.testing.assert_close(other.fused.weight.grad, -one.fused.weight.grad)  # of the labels alone


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (PAIR._replace(student=PAIR.student._replace(maps=((4, 8, 8),))), {}, "2 or more maps .* 1 .*--maps stages"),
        (PAIR._replace(student=PAIR.student._replace(num_classes=1)), {}, "the data has 1"),
        (PAIR, {"kd": 0.0, "hint": 0.0}, "not all 0"),
        (PAIR, {"hint": -1.0}, "0 or more"),
        (PAIR, {"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_what_cannot_work_is_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        SelfKD(pair, **options)


def test_alone_it_has_no_teacher_and_no_method():
    for criterion in ("selfkd", ("selfkd:0.5,ce:2",), ("ce", "selfkd")):
        recipe = make_recipe(criterion=criterion)
        assert (recipe.teacher, recipe.method) == (None, "none")
    terms = terms_of(make_recipe(criterion="selfkd"))
    assert {name: term.weight for name, term in terms.active.items()} == {"task": 1.0, "selfkd": 1.0}
    assert terms.needs("maps", student=True)
    assert not terms.needs("maps")
    assert {name for name, kind in CRITERIA.items() if not kind.needs} == {"ce", "selfkd"}
    assert [name for name in CRITERIA if needs_no_teacher([name])] == ["selfkd"]


def test_a_report_does_not_take_it_for_a_student_alone():
    runs = [Run(Path("run"), make_recipe(**options), {}, [], {}) for options in ({"criterion": "selfkd"}, ALONE)]
    assert [run.describe() for run in runs] == ["SELFKD", "alone"]


def test_a_published_config_trains_it_again():
    recipe = make_recipe(criterion="selfkd", criterion_options=("selfkd.form=byot",), data_dir="photos")
    assert make_recipe(**config_values(recipe), output="x") == replace(recipe, output="x")


def test_beside_a_teacher_it_is_one_more_term():
    for options in ({"criterion": ("selfkd", "at")}, {"criterion": "selfkd", "teacher": "embedded"}):
        recipe = make_recipe(**options)
        assert (recipe.teacher, recipe.method) == (("embedded",), "mas")
        objective = objective_of(recipe, terms_of(recipe), [PAIR])
        assert {"task", "kd", "selfkd"} <= set(objective.objective.criteria)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mas"}, r"method='mas' .* no teacher.* --teacher NAME, or leave --method out"),
        ({"method": "mag"}, "method='mag' .* no teacher"),
        ({"kd_weight": 1.0}, "kd reads the teacher's logits, and there is no teacher: .* leave kd out"),
        ({"train_only": "classifier"}, "train_only='classifier': .* trains the stages"),
        ({"fit_teacher_head": "probe"}, "there is no teacher"),
        ({"standardise_logits": True}, "Leave --standardise-logits out"),
        ({"criterion_options": ("selfkd.form=byot",), "task_weight": 0.0}, "which only the labels' loss trains"),
        ({"peer": "cifar_resnet8"}, "with task, selfkd alone, neither network learns anything of the other"),
        ({"criterion_options": ("selfkd.form=byo",)}, "unknown selfkd.form 'byo': did you mean byot"),
    ],
)
def test_what_needs_a_teacher_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        terms_of(make_recipe(criterion="selfkd", **options))
