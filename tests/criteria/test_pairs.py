"""Every criterion on pairs of networks: bridged or refused, compiled, and under MAG and MAS."""

import copy
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from cases import BATCH, CLASSES, PAIR, batch, features, parts
from every_criterion import CASES, FEWER, both, built, check_gradients, depends, every
from torch import nn

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import AT, CRITERIA, KD, CrossEntropy, FitNet, Objective
from mgd_timm.distiller import MutualLearning, Teacher
from mgd_timm.features import Batch, Features, FeatureTap, Pair, Shapes
from mgd_timm.granularity import MAG, MAS, GranularityHeads

# What networks show: CNN to CNN of other channels and sizes, tokens of a ViT (square maps of one size) on either side,
# and small images, of which the last maps are one position, or one row against one column.
CNN = Shapes(CLASSES, 10, ((4, 8, 8), (6, 4, 4), (8, 2, 2)), cam=(2, 2))


WIDE = Shapes(CLASSES, 12, ((8, 8, 8), (12, 4, 4), (16, 2, 2)), cam=(2, 2))


LARGE = Shapes(CLASSES, 12, ((8, 15, 15), (12, 8, 8), (16, 4, 4)), cam=(4, 4))


VIT = Shapes(CLASSES, 12, ((12, 6, 6), (12, 6, 6), (12, 6, 6)))


TINY = Shapes(CLASSES, 10, ((4, 4, 4), (6, 2, 2), (8, 1, 1)), cam=(1, 1))


TINY_WIDE = Shapes(CLASSES, 12, ((8, 4, 4), (12, 2, 2), (16, 1, 1)), cam=(1, 1))


ROW = Shapes(CLASSES, 10, ((4, 2, 8), (6, 1, 4), (8, 1, 2)), cam=(1, 2))


COLUMN = Shapes(CLASSES, 12, ((8, 8, 2), (12, 4, 1), (16, 2, 1)), cam=(2, 1))


KINDS = {
    "cc": (CNN, WIDE),
    "cl": (CNN, LARGE),
    "same": (CNN, CNN),
    "cv": (CNN, VIT),
    "vc": (VIT, CNN),
    "tiny": (TINY, TINY_WIDE),
    "tiny student": (TINY, WIDE),
    "tiny teacher": (CNN, TINY_WIDE),
    "crossed": (ROW, COLUMN),
}


# What is left of one position when its size is divided out is 1, whatever the networks see.
REFUSED = {
    **{("catkd", kind): "class activation maps of both .*cam=True" for kind in ("cv", "vc")},
    **{
        (name, kind): r"one position .*--img-size.*--maps"
        for name in ("at", "nst", "ft", "afd", "afds")
        for kind in ("tiny", "tiny student", "tiny teacher", "crossed")
    },
}


def pair_of(kind: str) -> Pair:
    student, teacher = KINDS[kind]
    classifier = nn.Linear(teacher.embed_dim, CLASSES).double().requires_grad_(False)
    return Pair(student, teacher, 16, torch.arange(16) % CLASSES, classifier)


@functools.cache
def usually_read(name: str) -> set[str]:
    """The parts of the student's features that the loss depends on where nothing is special."""
    pair = pair_of("cc")
    dependent = depends(built(name, pair), features(pair.student, 1), features(pair.teacher, 2))
    return {part for part, found in dependent.items() if found}


@pytest.mark.parametrize(("name", "kind"), [(n, k) for k in KINDS for n in CRITERIA if (n, k) not in REFUSED])
def test_any_pair_is_bridged(name, kind):
    """With gradients everywhere: of the same parts of the student's features, whatever their sizes."""
    pair = pair_of(kind)
    shown = features(pair.student, 1, grad=True)
    check_gradients(built(name, pair), shown, features(pair.teacher, 2))
    taught = {part for part, tensor in parts(shown).items() if tensor.grad is not None and tensor.grad.any()}
    assert taught
    assert taught == usually_read(name) & set(parts(shown))


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_or_a_pair_is_refused_with_the_way_out(name, kind):
    with pytest.raises(ValueError, match=REFUSED[name, kind]):
        CRITERIA[name](pair_of(kind))


@pytest.fixture(scope="module")
def networks():
    """Two that have whatever a criterion reads, at 16 pixels."""
    found = []
    for seed, name in enumerate(("cifar_resnet8x05", "cifar_wrn_16_1")):
        torch.manual_seed(seed)
        network = timm.create_model(name, num_classes=CLASSES)
        found.append(FeatureTap(network, (1, 2, 3), input_size=(3, 16, 16), cam=True))
    return found


def pictures() -> Batch:
    return batch()._replace(images=torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def test_what_a_teacher_shows_has_no_graph(networks):
    tap = copy.deepcopy(networks[1])
    teacher = Teacher(tap, GranularityHeads(tap.embed_dim, CLASSES)).train()
    teacher.requires_grad_(True)  # against better knowledge
    shown = teacher(pictures().images.requires_grad_(True))
    everything = [*parts(shown).values(), *shown.codes.values(), *shown.views.values()]
    assert len(everything) == 2 + 3 + 1 + 2 + 2
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in everything)


@every
def test_a_student_does_not_train_its_peer(name, networks):
    taps = copy.deepcopy(networks)
    shapes = [tap.shapes(16) for tap in taps]
    labels = torch.arange(16) % CLASSES
    pairs = [Pair(*shapes[::step], 16, labels, tap.classifier) for step, tap in zip((1, -1), taps[::-1], strict=True)]
    objectives = [Objective(**{name: (1.0, CRITERIA[name](pair))}) for pair in pairs]
    if name == "dml":
        objectives = [MAG(pair, objective) for pair, objective in zip(pairs, objectives, strict=True)]
    together = MutualLearning(*taps, *objectives)
    terms, _ = together(pictures())
    sides = ({"student", "objective"}, {"peer", "peer_objective"})
    for own, prefix in zip(sides, ("", "peer_"), strict=True):
        together.zero_grad()
        sum(term for key, term in terms.items() if key.startswith("peer_") == bool(prefix)).backward()
        for key, p in together.named_parameters():
            assert key.split(".")[0] in own or p.grad is None, key
        backbone = together.peer if prefix else together.student
        assert any(p.grad is not None and p.grad.any() for p in backbone.parameters())


@pytest.mark.slow
def test_every_criterion_compiles_as_one_graph():
    """Dynamo cannot trace the type checks of the tests, so in a process without them."""
    script = Path(__file__).parents[1] / "helpers" / "compiled_criteria.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*CRITERIA, "standardised"]


@every
@pytest.mark.parametrize("method", [MAG, MAS])
def test_it_composes_with_mag_and_mas(name, method):
    pair, (student, teacher) = CASES[name].pair, both(name, grad=True)
    torch.manual_seed(0)
    terms = {"task": (1.0, CrossEntropy(pair)), "kd": (1.0, KD(pair))}
    whole = method(
        pair, Objective(**terms, **({} if name in ("ce", "kd") else {name: (2.0, CRITERIA[name](pair))}))
    ).double()
    heads = GranularityHeads(pair.teacher.embed_dim, CLASSES).double()
    codes = {n: c.detach() for n, c in heads.encode(teacher.embedding).items()}
    views = {n: v.detach() for n, v in heads.decode(codes).items()}
    found = whole(student, teacher._replace(codes=codes, views=views), batch())
    assert set(found) == {"task", "kd", *([] if name == "ce" else [name]), "abstract", "detailed"}
    sum(found.values()).backward()
    assert all(p.grad is not None for p in whole.parameters() if p.requires_grad)
    if "logits" in CRITERIA[name].needs and method is MAS:
        stable = teacher._replace(logits=torch.stack([teacher.logits, *views.values()]).mean(0))
        weight, term = (1.0 if name == "kd" else 2.0), whole.objective.criteria[name]
        torch.manual_seed(0)
        torch.testing.assert_close(found[name], weight * term(student, stable, batch()))


NO_MAPS = PAIR._replace(teacher=PAIR.teacher._replace(maps=()))


OTHER_CLASSES = PAIR._replace(teacher=PAIR.teacher._replace(num_classes=9))


@every
def test_what_a_pair_lacks_is_refused_at_construction(name):
    """Each part that a criterion reads, taken from its pair in turn; relations of embeddings alone go with any pair."""
    pair, kind = CASES[name].pair, CRITERIA[name]
    student, teacher = pair.student, pair.teacher
    lacking = []
    if "maps" in kind.needs:
        lacking += [pair._replace(teacher=teacher._replace(maps=())), pair._replace(student=student._replace(maps=()))]
    if "maps" in kind.student_needs:
        lacking += [pair._replace(student=student._replace(maps=()))]
    if "cams" in kind.needs:
        lacking += [
            pair._replace(teacher=teacher._replace(cam=None)),
            pair._replace(student=student._replace(cam=None)),
        ]
    if kind.needs & {"logits", "cams"}:
        lacking += [pair._replace(teacher=teacher._replace(num_classes=9))]
    if name == "crd":
        lacking += [pair._replace(labels=None), pair._replace(num_samples=0)]
    if name == "srrl":
        lacking += [pair._replace(teacher_classifier=None)]
    assert lacking or name in ("ce", "cc", "rkd", "pkt")
    for other in lacking:
        with pytest.raises(ValueError, match=r".{40,}"):  # more than a word
            CRITERIA[name](other)


@every
def test_features_of_other_shapes_raise(name):
    if not CRITERIA[name].needs:
        pytest.skip("the teacher is not read")
    criterion, (student, teacher) = built(name), both(name)
    fewer = Features(
        teacher.logits[:3],
        teacher.embedding[:3],
        tuple(m[:3] for m in teacher.maps),
        cam=teacher.cam[:3] if teacher.cam is not None else None,
    )
    with pytest.raises((ValueError, RuntimeError, TypeError, UserWarning)):  # torch warns before it fails
        criterion(student, fewer, batch())
    if CRITERIA[name].needs & {"maps"} and name not in (
        "sp",
        "masked_generative",
        "ft",
    ):  # these read the deepest map alone
        with pytest.raises((ValueError, RuntimeError, TypeError, IndexError)):
            criterion(student, teacher._replace(maps=teacher.maps[:1]), batch())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AT(NO_MAPS), r"student has 2 .*teacher 0 .*maps='last'"),
        (lambda: AT(FEWER), r"student has 2 .*teacher 1 .*maps='last'"),
        (lambda: FitNet(NO_MAPS), r"student has 2 .*teacher 0 .*maps='last'"),
        (lambda: FitNet(FEWER), r"student has 2 .*teacher 1 .*maps='last'"),
        (lambda: FitNet(PAIR, hint=2), "hint=2: 2 maps are tapped, choose 0 to 1"),
        (lambda: FitNet(PAIR, hint=-1), "choose 0 to 1"),
        (lambda: KD(OTHER_CLASSES), "student has 6 classes, the teacher 9.*mgd-timm train"),
        (lambda: KD(PAIR, temperature=0), "temperature=0: expected a positive"),
        (lambda: KD(PAIR, temperature=float("nan")), "temperature=nan"),
        (lambda: CrossEntropy(PAIR, smoothing=1.0), "0 <= smoothing < 1"),
        (lambda: CrossEntropy(PAIR, smoothing=-0.1), "0 <= smoothing < 1"),
        (lambda: Objective(), "no term"),
        (lambda: Objective(task=(-1.0, CrossEntropy(PAIR))), "weight of 'task' is -1.0"),
        (lambda: Objective(task=(float("nan"), CrossEntropy(PAIR))), "weight of 'task' is nan"),
        (lambda: Objective(task=(float("inf"), CrossEntropy(PAIR))), "weight of 'task' is inf"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
