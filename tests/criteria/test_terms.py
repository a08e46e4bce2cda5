"""The objective from a recipe's words."""

import pytest
import torch
from cases import PAIR, batch, features
from torch import nn

from mgd_timm.criteria import CRITERIA, CrossEntropy, Objective
from mgd_timm.criteria.kd import KD
from mgd_timm.pipeline.checks import check_recipe, check_several_teachers
from mgd_timm.pipeline.plan import objective_of, terms_of
from mgd_timm.recipe.recipe import make_recipe


def built(**options):
    recipe = make_recipe(**options)
    return objective_of(recipe, terms_of(recipe), [PAIR])


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {"task": 0.2, "kd": 0.8}),
        ({"method": "none"}, {"task": 0.2, "kd": 0.8}),
        ({"criterion": ("at",)}, {"task": 1, "kd": 1, "at": 1000}),
        ({"criterion": ("at",), "method": "none"}, {"task": 1, "kd": 0, "at": 1000}),
        ({"criterion": ("at", "kd"), "method": "none"}, {"task": 1, "kd": 1, "at": 1000}),
        ({"criterion": ("at:1000,crd:0.5",)}, {"task": 1, "kd": 1, "at": 1000, "crd": 0.5}),
        ({"criterion": ("at:500", "crd"), "kd_weight": 0.3}, {"task": 1, "kd": 0.3, "at": 500, "crd": 0.8}),
        ({"criterion": ("at", "ce:2")}, {"task": 2, "kd": 1, "at": 1000}),
        ({"criterion": ("sskd",), "method": "none"}, {"task": 0.1, "kd": 0.9, "sskd": 1}),
        ({"criterion": ("at,sskd",), "kd_weight": 0.5}, {"task": 0.1, "kd": 0.5, "at": 1000, "sskd": 1}),
        ({"criterion": ("at,sskd:0",)}, {"task": 1, "kd": 1, "at": 1000, "sskd": 0}),
        ({"peer": "cifar_resnet8"}, {"task": 1, "kd": 0, "dml": 1}),
        ({"peer": "cifar_resnet8", "criterion": ("ekd",)}, {"task": 1, "kd": 0, "ekd": 1}),
        ({"peer": "cifar_resnet8", "method": "mag"}, {"task": 1, "kd": 0, "dml": 1}),
        ({"peer": "cifar_resnet8", "teacher": "embedded"}, {"task": 1, "kd": 1, "dml": 1}),
        (
            {"peer": "cifar_resnet8", "teacher": "embedded", "method": "mas", "criterion": ("at:5,dml:0.2",)},
            {"task": 1, "kd": 1, "at": 5, "dml": 0.2},
        ),
    ],
)
def test_weights(options, weights):
    assert {name: term.weight for name, term in terms_of(make_recipe(**options)).by_name.items()} == weights


def test_warm_up_and_options():
    options = ("dkd.beta=2", "kd.divergence=reverse", "crd.queue=64")
    recipe = make_recipe(criterion=("dkd:1:20,at::5", "crd", "kd:0.5"), criterion_options=options, kd_temperature=2.0)
    terms = terms_of(recipe).by_name
    assert {name: (t.weight, t.warmup) for name, t in terms.items()} == {
        "task": (1, 0),
        "kd": (0.5, 0),
        "dkd": (1, 20),
        "at": (1000, 5),
        "crd": (0.8, 0),
    }
    assert terms["dkd"].options == {"beta": 2.0}
    assert terms["kd"].options == {"divergence": "reverse", "temperature": 2.0}
    assert terms["crd"].options == {"queue": 64}
    objective = built(criterion=("dkd:1:20", "kd"), criterion_options=("dkd.beta=2",), method="none")
    assert objective.warmups == {"dkd": 20.0}
    assert objective.criteria["dkd"].beta == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": ("att",)}, "unknown criterion 'att': did you mean at"),
        ({"criterion": ("at:x",)}, "'at:x': expected NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS, and 'x' is not a number"),
        ({"criterion": ("at:1:2:3",)}, "expected NAME"),
        ({"criterion": ("at:1", "at:2")}, "two weights of at"),
        ({"criterion": ("kd:0.5",), "kd_weight": 0.8}, "two weights of kd: 0.5"),
        ({"criterion_options": ("kd",)}, "expected NAME.OPTION=VALUE"),
        ({"criterion_options": ("kdd.x=1",)}, "unknown criterion 'kdd'"),
        ({"criterion_options": ("kd.temp=1",)}, "unknown option of kd 'temp': did you mean temperature"),
        ({"criterion_options": ("kd.temperature=cold",)}, "kd.temperature='cold': expected float"),
        ({"criterion_options": ("kd.divergence=backward",)}, "unknown kd.divergence 'backward'"),
        ({"criterion_options": ("dkd.beta=2",)}, "options of dkd, which --criterion .* does not name"),
        (
            {"criterion_options": ("kd.temperature=2",), "kd_temperature": 3.0},
            "two values of kd.temperature: 2.0 .* 3.0",
        ),
        ({"criterion_options": ("kd.temperature=2", "kd.temperature=3")}, "two values of kd.temperature: give one"),
        ({"criterion_options": ("kd.temperature=[",)}, r"kd.temperature='\[': expected float"),
        (
            {"criterion": ("at",), "method": "none", "criterion_options": ("kd.temperature=2",)},
            "options of kd without effect, as its weight is 0",
        ),
        ({"criterion": ("at:-1",)}, "'at:-1': expected finite numbers, 0 or more"),
        ({"criterion": ("at:nan",)}, "'at:nan': expected finite numbers"),
        ({"criterion": ("at:1:inf",)}, "'at:1:inf': expected finite numbers"),
        ({"criterion": ("ab:5",)}, "ab fits the student before the run.*--fitting-lr"),
        ({"criterion": ("fsp::20",)}, "fsp fits the student before the run"),
        ({"criterion": ("dml",)}, "two students .* --peer NAME .* --criterion kd --kd-temperature 1"),
        ({"criterion": ("ekd",)}, "ekd trains its teacher in the run: name the teacher with --peer NAME in place of"),
        ({"criterion": ("kd,dml,ekd",), "peer": "cifar_resnet8", "teacher": "embedded"}, "ekd trains its teacher"),
        ({"criterion": ("ekd,ft",), "peer": "cifar_resnet8"}, "a peer is not trained yet"),
        ({"criterion": ("ft",), "peer": "cifar_resnet8"}, "a peer is not trained yet"),
        ({"criterion": ("dml,ab",), "peer": "cifar_resnet8"}, "ab is fitted on a trained teacher"),
        (
            {"criterion": ("dml,ft",), "peer": "cifar_resnet8", "teacher": "embedded"},
            "ft is fitted on a trained teacher before the run, and there are two students",
        ),
        (
            {"criterion": ("kd",), "peer": "cifar_resnet8", "teacher": "embedded"},
            "the students learn nothing of each other. Name dml",
        ),
        (
            {"criterion": ("dml",), "peer": "cifar_resnet8", "teacher": "embedded"},
            "the students learn nothing of the teacher. Name another criterion",
        ),
        ({"criterion": ("dml,sskd",), "peer": "cifar_resnet8"}, "sskd is fitted on a trained teacher"),
        ({"criterion": ("at",), "method": "none", "standardise_logits": True}, "no criterion of .*'at'.* reads logits"),
    ],
)
def test_wrong_words(options, message):
    with pytest.raises(ValueError, match=message):
        terms_of(make_recipe(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": ("crd",), "criterion_options": ("crd.momentum=2",)}, "criterion 'crd': momentum=2"),
        ({"criterion": ("at",), "kd_weight": 0.0}, "no term with a weight reads the teacher's logits"),
        ({"criterion": ("sskd",), "kd_weight": 0.0}, "no term with a weight reads the teacher's logits"),
        ({"criterion": ("sskd",), "criterion_options": ("sskd.similarity_kept=2",)}, "similarity_kept=2.0: expected a"),
        ({"criterion": ("sskd",), "criterion_options": ("sskd.similarity_weight=0",)}, "similarity_weight=0.0: expect"),
        ({"criterion": ("sskd",), "criterion_options": ("sskd.rotated_weight=-1",)}, "rotated_weight=-1.0: expected a"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        built(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peer": "cifar_resnet8", "method": "mas"}, "MAS needs fitted heads, and two students have none"),
        ({"peer": "cifar_resnet8", "teacher_checkpoint": "a.safetensors"}, "there is no teacher"),
        ({"peer": "cifar_resnet8", "train_only": "classifier"}, "distillation trains the backbone"),
        ({"fitting_epochs": 0}, "fitting_epochs=0"),
        ({"fitting_lr": -1.0}, "fitting_lr=-1.0"),
    ],
)
def test_recipes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**options)


def test_options_take_numbers_as_people_write_them():
    words = ("crd.temperature=7e-2", "crd.queue=none", "ofa.eps=[1, 1.5, 2]", "masked_generative.mask=positions")
    terms = terms_of(make_recipe(criterion=("crd,ofa,masked_generative",), criterion_options=words)).by_name
    assert terms["crd"].options == {"temperature": 0.07, "queue": None}
    assert terms["ofa"].options == {"eps": (1.0, 1.5, 2.0)}
    assert terms["masked_generative"].options == {"mask": "positions"}


def test_a_criterion_that_fits_the_student_is_left_out_of_the_run():
    terms = terms_of(make_recipe(criterion=("ab,ft,at",), method="none"))
    assert list(terms.fitted_first("student")) == ["ab"]
    assert list(terms.fitted_first("teacher")) == ["ft"]
    assert list(terms_of(make_recipe(criterion=("sskd",))).fitted_first("teacher")) == ["sskd"]
    assert list(built(criterion=("ab,ft,at",), method="none").criteria) == ["task", "ft", "at"]
    assert not terms_of(make_recipe(criterion=("ab",), method="none")).needs("maps")
    assert terms.needs("maps")
    assert not terms_of(make_recipe(teacher=None, criterion=("at",))).needs("maps")


def test_standardised_logits_wrap_what_reads_logits():
    objective = built(criterion=("dkd,at,kd",), standardise_logits=True, method="none")
    kinds = {name: type(criterion).__name__ for name, criterion in objective.criteria.items()}
    assert kinds == {"task": "CrossEntropy", "kd": "Standardised", "dkd": "Standardised", "at": "AT"}
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    scaled = student._replace(logits=3 * student.logits - 5)
    one, two = (objective.double()(shown, teacher, batch()) for shown in (student, scaled))
    torch.testing.assert_close(one["kd"], two["kd"])
    assert one["task"] != two["task"]


def test_weights_warm_up_linearly_and_compile_once():
    student, teacher = features(PAIR.student, 1), features(PAIR.teacher, 2)
    objective = Objective(task=(1.0, CrossEntropy(PAIR)), kd=(0.5, KD(PAIR), 4))
    full = objective(student, teacher, batch())
    torch.testing.assert_close(full["kd"], 0.5 * KD(PAIR)(student, teacher, batch()))
    for epochs, share in ((0, 0), (1, 0.25), (3.5, 0.875), (4, 1), (100, 1)):
        objective.set_progress(epochs)
        shown = objective(student, teacher, batch())
        torch.testing.assert_close(shown["kd"], share * full["kd"])
        torch.testing.assert_close(shown["task"], full["task"])
    assert not objective.state_dict()  # it follows from the number of updates
    assert "progress" not in dict(Objective(kd=(0.5, KD(PAIR))).named_buffers())
    with pytest.raises(ValueError, match="warm-up of 'kd' is -1 epochs"):
        Objective(kd=(0.5, KD(PAIR), -1))


def test_every_criterion_is_built_by_its_word():
    for name, kind in CRITERIA.items():
        if kind.peers or not kind.needs:
            continue
        objective = built(criterion=(name,), method="mag")
        assert isinstance(objective, nn.Module)
        assert (name in objective.objective.criteria) is (kind.fits != "student")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": ("dkd:1:20",), "epochs": 5}, "'dkd:1:20' warms up over 20 of 5 epochs"),
        (
            {"criterion": ("at",), "method": "none", "kd_temperature": 2.0},
            "options of kd without effect, .* 0: {'temperature': 2.0}.*--kd-temperature",
        ),
        (
            {"criterion": ("at",), "task_weight": 0.0, "smoothing": 0.1},
            "options of ce without effect, .* 0: {'smoothing': 0.1}.*--smoothing",
        ),
        ({"criterion": ("at:0",), "task_weight": 0.0, "method": "none"}, "all weights are 0"),
        ({"criterion": ("ekd:0",), "peer": "cifar_resnet8"}, "with task alone, neither network learns anything"),
        (
            {"kd_weight": 0.0, "task_weight": 0.0, "method": "mag"},
            r"0: task, kd \(the codes alone do not train the classifier\)",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        terms_of(make_recipe(**options))


def test_names_in_tags_are_those_with_a_weight():
    assert terms_of(make_recipe(criterion=("dkd, at:0", "kd"))).criterion_names() == ["dkd", "kd"]
    terms = terms_of(make_recipe(criterion=("crd",), criterion_options=("crd.queue=1e5", "crd.dim=16.0"))).by_name
    assert terms["crd"].options == {"queue": 100_000, "dim": 16}


def test_codes_that_are_not_there_have_no_divergence():
    recipe = make_recipe(method="none", code_divergence="bdd")
    with pytest.raises(ValueError, match="code_divergence='bdd' with method='none', which has no codes"):
        check_recipe(recipe, terms_of(recipe))


def test_what_reads_no_teacher_is_not_summed_over_several():
    terms = terms_of(make_recipe(teacher=("a", "b"), criterion=("kd", "selfkd"), teachers_as="sum"))
    with pytest.raises(ValueError, match="selfkd reads no teacher, and teachers_as='sum' has each criterion once"):
        check_several_teachers(terms, 2, mean=False)
    check_several_teachers(terms, 2, mean=True)
