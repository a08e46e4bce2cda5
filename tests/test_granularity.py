"""The paper's heads and objectives: formulas, golden values, and who gets a gradient."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from every_criterion import term_names
from torch import Tensor, nn

import mgd_timm.models  # noqa: F401 - registers cifar_*
from mgd_timm.criteria import CRITERIA, KD, CrossEntropy, Objective, kl_divergence
from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.features import Batch, Features, FeatureTap, Pair, Shapes, extract_with_rotations
from mgd_timm.granularity import MAG, MAS, GranularityHeads, HeadFitting, stable_excitation
from mgd_timm.recipe.granularity import DEFAULT_GRANULARITIES, Granularity

SMALL = (Granularity("abstract", 4, 2.0), Granularity("detailed", 24, 8.0))
CLASSES = 10


def wave(shape: tuple[int, ...], a: float, b: float, gain: float = 1.0) -> Tensor:
    """The generator of the golden values: gain * sin(a n + b)."""
    return gain * torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).reshape(shape)


Z_S, Z_T = wave((4, 10), 0.7, 0.1, 3), wave((4, 10), 0.9, 0.3, 3)
VIEWS = {"abstract": wave((4, 10), 0.5, 0.2, 3), "detailed": wave((4, 10), 0.6, 0.4, 3)}
LABELS = torch.tensor([1, 3, 5, 7])


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def images(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batch(number: int = 4) -> Batch:
    return Batch(images(number), torch.arange(number) % CLASSES, torch.arange(number))


def tap(name: str, seed: int, num_classes: int = CLASSES) -> FeatureTap:
    torch.manual_seed(seed)
    return FeatureTap(timm.create_model(name, num_classes=num_classes), (1, 2, 3), cam=True)


@pytest.fixture
def teacher() -> Teacher:
    features = tap("cifar_resnet14", 0)
    return Teacher(features, GranularityHeads(features.embed_dim, CLASSES, SMALL))


@pytest.fixture
def student() -> FeatureTap:
    return tap("cifar_resnet8x05", 1)


def pair_of(student: FeatureTap, teacher: Teacher) -> Pair:
    return Pair(student.shapes(32), teacher.tap.shapes(32), 4, torch.arange(4), teacher.tap.classifier)


def plain_pair(num_classes: int = 10, student_width: int = 12, teacher_width: int = 12) -> Pair:
    return Pair(Shapes(num_classes, student_width, ()), Shapes(num_classes, teacher_width, ()))


# Sizes and golden values


@pytest.mark.parametrize(
    ("width", "total", "encoders"),
    [
        (64, 62_728, 29_120),
        (128, 141_320, 74_304),
        (256, 347_656, 213_824),
        (512, 956_936, 689_472),
        (960, 2_653_960, 2_152_640),
        (1024, 2_961_928, 2_427_200),
        (1280, 4_357_640, 3_689_280),
        (2048, 10_117_640, 9_048_384),
    ],
)
def test_parameter_counts(width, total, encoders):
    with torch.device("meta"):
        heads, student_heads = GranularityHeads(width, 100), GranularityHeads(width, None)
    assert (count(heads), count(heads.encoders), count(student_heads)) == (total, encoders, encoders)
    for g in DEFAULT_GRANULARITIES:
        assert count(heads.encoders[g.name]) == width**2 + width + width * g.dim + g.dim
        assert count(heads.decoders[g.name]) == g.dim * width + width + width * 100 + 100


def test_defaults_are_the_papers():
    assert [(g.name, g.dim, g.temperature, g.weight) for g in DEFAULT_GRANULARITIES] == [
        ("abstract", 64, 2, 1),
        ("detailed", 256, 8, 1),
    ]


def test_golden_values_of_the_fitting_loss():
    """L_AK and L_DK of the fitting, from decoders whose bias is the golden view, one sample at a time."""
    heads = GranularityHeads(12, 10).double()
    sums = dict.fromkeys(VIEWS, 0.0)
    for index in range(4):
        one = slice(index, index + 1)
        for name, decoder in heads.decoders.items():
            nn.init.zeros_(decoder[2].weight)
            decoder[2].bias.data = VIEWS[name][index].clone()
        shown = Features(Z_T[one], torch.ones(1, 12, dtype=torch.float64))
        terms, logits = HeadFitting(heads)(Batch(torch.zeros(1, 3, 8, 8), LABELS[one], LABELS[one]), shown)
        torch.testing.assert_close(logits, (Z_T[one] + VIEWS["abstract"][one] + VIEWS["detailed"][one]) / 3)
        for name, term in terms.items():
            sums[name] += term.item() / 4
    assert sums == pytest.approx({"abstract": 6.0685928597, "detailed": 7.3035753081}, abs=1e-8)


def test_golden_values_of_the_codes():
    abstract = kl_divergence(wave((4, 64), 0.31, 0.2, 2), wave((4, 64), 0.37, 0.5, 2), 2.0)
    detailed = kl_divergence(wave((4, 256), 0.11, 0.2, 2), wave((4, 256), 0.13, 0.5, 2), 8.0)
    assert abstract.item() == pytest.approx(1.7666501606, abs=1e-8)
    assert detailed.item() == pytest.approx(1.9139155382, abs=1e-8)


def test_golden_value_of_the_stable_target():
    stable = stable_excitation(Z_T, VIEWS)
    torch.testing.assert_close(stable, (Z_T + VIEWS["abstract"] + VIEWS["detailed"]) / 3)
    assert kl_divergence(Z_S, stable, 4.0).item() == pytest.approx(2.4015216894, abs=1e-8)


def test_mag_terms_are_the_specifications():
    """L_AK and L_DK of MAG from encoders that give the golden codes, one sample at a time."""
    pair = plain_pair()
    mag = MAG(pair, Objective(task=(1.0, CrossEntropy(pair)))).double()
    codes = {"abstract": (wave((4, 64), 0.31, 0.2, 2), wave((4, 64), 0.37, 0.5, 2))}
    codes["detailed"] = (wave((4, 256), 0.11, 0.2, 2), wave((4, 256), 0.13, 0.5, 2))
    sums = dict.fromkeys(codes, 0.0)
    for index in range(4):
        one = slice(index, index + 1)
        for name, (ours, _) in codes.items():
            nn.init.zeros_(mag.student_heads.encoders[name][2].weight)
            mag.student_heads.encoders[name][2].bias.data = ours[index].clone()
        embedding = torch.ones(1, 12, dtype=torch.float64)
        theirs = Features(Z_T[one], embedding, codes={name: code[one] for name, (_, code) in codes.items()})
        terms = mag(Features(Z_S[one], embedding), theirs, Batch(torch.zeros(1, 3, 8, 8), LABELS[one], LABELS[one]))
        assert list(terms) == ["task", "abstract", "detailed"]
        for name in sums:
            sums[name] += terms[name].item() / 4
    assert sums == pytest.approx({"abstract": 1.7666501606, "detailed": 1.9139155382}, abs=1e-8)


# MAG and MAS


def build_objective(pair: Pair, *names: str) -> Objective:
    return Objective(**{name: (CRITERIA[name].weight, CRITERIA[name](pair)) for name in names})


def test_mas_is_mag_when_the_views_are_the_logits(student, teacher):
    pair = pair_of(student, teacher)
    torch.manual_seed(2)
    mag = MAG(pair, build_objective(pair, "ce", "kd"), SMALL)
    torch.manual_seed(2)
    mas = MAS(pair, build_objective(pair, "ce", "kd"), SMALL)
    shown = teacher(images())
    theirs = shown._replace(logits=shown.logits.double(), views={name: shown.logits.double() for name in shown.views})
    ours = student.eval()(images())
    plain, stable = mag(ours, theirs, batch()), mas(ours, theirs, batch())
    assert list(plain) == list(stable) == ["ce", "kd", "abstract", "detailed"]
    for name in plain:
        torch.testing.assert_close(stable[name], plain[name], rtol=0, atol=1e-12)
    assert not torch.equal(mas(ours, shown, batch())["kd"], plain["kd"])


def test_mas_changes_the_target_of_logit_distillation_only(student, teacher):
    pair = pair_of(student, teacher)
    mas = MAS(pair, build_objective(pair, "ce", "kd", "at"), SMALL)
    ours, theirs = student.eval()(images()), teacher(images())
    mag_terms, mas_terms = MAG.forward(mas, ours, theirs, batch()), mas(ours, theirs, batch())
    for name in mag_terms:
        assert torch.equal(mag_terms[name], mas_terms[name]) is (name != "kd")
    mean = (theirs.logits + theirs.views["abstract"] + theirs.views["detailed"]) / 3
    torch.testing.assert_close(mas_terms["kd"], 0.8 * kl_divergence(ours.logits, mean, 4.0))


@pytest.mark.parametrize("kd_weight", [None, 0.0])
def test_mas_without_a_logits_term_is_refused(kd_weight):
    pair = plain_pair()
    terms = {"task": (1.0, CrossEntropy(pair))}
    if kd_weight is not None:
        terms["kd"] = (kd_weight, KD(pair))
    with pytest.raises(ValueError, match="without one MAS is MAG"):
        MAS(pair, Objective(**terms))
    assert MAG(pair, Objective(**terms)).needs == {"embedding"}


def kd_host(pair: Pair) -> Objective:
    return Objective(kd=(1.0, KD(pair)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Granularity("a", 0, 2.0), "dim=0"),
        (lambda: Granularity("a", 4, 0.0), "temperature=0.0"),
        (lambda: Granularity("a", 4, -1.0), "temperature=-1.0"),
        (lambda: Granularity("a", 4, 2.0, -1.0), "weight=-1.0"),
        (lambda: Granularity("a", 4, 2.0, float("nan")), "weight=nan"),
        (lambda: GranularityHeads(8, 10, ()), "one or more, with distinct names"),
        (lambda: GranularityHeads(8, 10, (SMALL[0], SMALL[0])), "distinct names"),
        (lambda: HeadFitting(GranularityHeads(8, None)), "heads with decoders"),
        (lambda: MAG(plain_pair(), kd_host(plain_pair()), (Granularity("kd", 4, 2.0),)), "'kd' has the name of a term"),
        (lambda: MAG(plain_pair(), kd_host(plain_pair()), (Granularity("a", 4, 2.0, 0.0),)), "one or more"),
        (
            lambda: Teacher(tap("cifar_resnet8", 0), GranularityHeads(32, 10)),
            "embedding of 32 dims, but cifar_resnet8 has 64",
        ),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_teacher_without_the_right_heads_is_refused(student, teacher):
    pair = pair_of(student, teacher)
    ours = student.eval()(images())
    bare, full = Teacher(teacher.tap)(images()), teacher(images())
    encoders = Teacher(teacher.tap, GranularityHeads(64, None, SMALL))(images())
    mag, mas = (cls(pair, build_objective(pair, "ce", "kd"), SMALL) for cls in (MAG, MAS))
    with pytest.raises(ValueError, match="'abstract' of 4 dims: the teacher has no codes"):
        mag(ours, bare, batch())
    with pytest.raises(
        ValueError, match=r"'abstract' of 64 dims: the teacher has codes of \{'abstract': 4, 'detailed': 24\}"
    ):
        MAG(pair, build_objective(pair, "ce"))(ours, full, batch())
    assert mag(ours, encoders, batch())["abstract"] > 0  # MAG reads no views
    for shown in (bare, encoders):
        with pytest.raises(ValueError, match="heads with decoders"):
            mas(ours, shown, batch())


def test_a_granularity_of_weight_zero_is_left_out(student, teacher):
    pair = pair_of(student, teacher)
    one = (SMALL[0], Granularity("detailed", 24, 8.0, 0.0))
    mag = MAG(pair, build_objective(pair, "ce"), one)
    assert list(mag.student_heads.encoders) == ["abstract"]
    assert list(mag(student.eval()(images()), teacher(images()), batch())) == ["ce", "abstract"]


def test_code_weights_scale_their_terms(student, teacher):
    pair = pair_of(student, teacher)
    torch.manual_seed(0)
    one = MAG(pair, build_objective(pair, "ce"), SMALL)
    torch.manual_seed(0)
    three = MAG(pair, build_objective(pair, "ce"), tuple(Granularity(g.name, g.dim, g.temperature, 3) for g in SMALL))
    ours, theirs = student.eval()(images()), teacher(images())
    for name in ("abstract", "detailed"):
        torch.testing.assert_close(three(ours, theirs, batch())[name], 3 * one(ours, theirs, batch())[name])


# Precision


def test_codes_and_views_stay_float32_under_autocast(teacher):
    """In bfloat16 the divergence of nearly equal codes came out negative and T^2 = 64 magnified it."""
    heads = teacher.heads
    with torch.autocast("cpu", torch.bfloat16):
        shown = teacher(images())
        assert shown.logits.dtype == torch.bfloat16
        assert {v.dtype for v in (*shown.codes.values(), *shown.views.values())} == {torch.float32}
        near = heads.encode(shown.embedding + 1e-3)
        for g in SMALL:
            rounding = g.temperature**2 * torch.finfo(torch.float32).eps
            assert kl_divergence(shown.codes[g.name], near[g.name], g.temperature) >= -rounding
            half = kl_divergence(shown.codes[g.name].bfloat16(), near[g.name].bfloat16(), g.temperature)
            assert half.dtype == torch.float32
            assert half >= -rounding
        assert stable_excitation(shown.logits, shown.views).dtype == torch.float32
    assert heads.double().encode(torch.zeros(1, 64, dtype=torch.float64))["abstract"].dtype == torch.float64


# Fitting the heads


def test_joint_gradients_are_those_of_separate_passes(teacher):
    heads = copy.deepcopy(teacher.heads).requires_grad_(True)
    shown = Teacher(teacher.tap)(images())
    labels = batch().labels
    sum(HeadFitting(heads)(batch(), shown)[0].values()).backward()
    for g in SMALL:
        encoder, decoder = copy.deepcopy(heads.encoders[g.name]), copy.deepcopy(heads.decoders[g.name])
        encoder.zero_grad()
        decoder.zero_grad()
        view = decoder(encoder(shown.embedding))
        soft = F.kl_div(
            F.log_softmax(view / g.temperature, 1), F.softmax(shown.logits / g.temperature, 1), reduction="batchmean"
        )
        (F.cross_entropy(view, labels) + g.temperature**2 * soft).backward()
        for joint, alone in ((heads.encoders[g.name], encoder), (heads.decoders[g.name], decoder)):
            for p, q in zip(joint.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)


def test_fitting_lowers_the_loss_and_leaves_the_teacher_bitwise_alone(teacher):
    bare = Teacher(teacher.tap)
    before = {key: value.clone() for key, value in bare.state_dict().items()}
    heads = copy.deepcopy(teacher.heads).requires_grad_(True)
    fitting = HeadFitting(heads).train()
    bare.train()
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        terms, logits = fitting(batch(), bare(images()))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(sum(terms.values()).item())
    assert list(terms) == ["abstract", "detailed"]
    assert logits.shape == (4, CLASSES)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in bare.state_dict().items())
    assert all(p.grad is None for p in bare.parameters())


def test_fitting_takes_soft_labels(teacher):
    shown = Teacher(teacher.tap)(images())
    hard = batch()
    soft = hard._replace(labels=F.one_hot(hard.labels, CLASSES).double())
    for fitting in (HeadFitting(teacher.heads), HeadFitting(copy.deepcopy(teacher.heads).double())):
        wide = shown._replace(embedding=shown.embedding.to(next(fitting.parameters()).dtype))
        for name, term in fitting(soft, wide)[0].items():
            torch.testing.assert_close(term, fitting(hard, wide)[0][name])


# Teacher and Distiller


def wrap(method: str, pair: Pair, objective: Objective) -> Objective | MAG:
    return {
        "none": lambda: objective,
        "mag": lambda: MAG(pair, objective, SMALL),
        "mas": lambda: MAS(pair, objective, SMALL),
    }[method]()


@pytest.mark.parametrize("criterion", [name for name, kind in CRITERIA.items() if not kind.trains_teacher])
@pytest.mark.parametrize("method", ["none", "mag", "mas"])
def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(method, criterion, student, teacher):
    pair = pair_of(student, teacher)
    objective = wrap(method, pair, build_objective(pair, *dict.fromkeys(("ce", "kd", criterion))))
    distiller = Distiller(student, objective).train()
    teacher.train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    terms, logits = distiller(batch(), extract_with_rotations(teacher, images()))
    names = [part for name in dict.fromkeys(("ce", "kd", criterion)) for part in term_names(name)]
    expected = names + ([] if method == "none" else ["abstract", "detailed"])
    assert list(terms) == expected
    assert all(term.ndim == 0 and term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert logits.shape == (4, CLASSES)
    sum(terms.values()).backward()
    assert [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not [name for name in distiller.state_dict() if "heads.decoder" in name]
    theirs = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not [name for name, tensor in distiller.state_dict().items() if tensor.data_ptr() in theirs]


def test_the_code_terms_reach_the_students_backbone(student, teacher):
    pair = pair_of(student, teacher)
    terms, _ = Distiller(student, MAG(pair, build_objective(pair, "ce"), SMALL))(batch(), teacher(images()))
    (terms["abstract"] + terms["detailed"]).backward()
    assert student.model.conv1.weight.grad.abs().sum() > 0
    assert student.model.fc.weight.grad is None  # codes are before the classifier


def test_the_teacher_stays_in_eval_mode_and_draws_no_graph(teacher):
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    shown = teacher(images())
    assert not any(v.requires_grad for v in (shown.logits, shown.embedding, *shown.maps, *shown.codes.values()))
    assert not shown.logits.is_inference()  # adapters save teacher maps for backward
    torch.testing.assert_close(shown.views, teacher.heads.decode(shown.codes))


def test_the_teachers_view_comes_first(teacher):
    flipped = Teacher(teacher.tap, teacher.heads, input_adapter=nn.ReLU())
    assert torch.equal(flipped(images()).logits, teacher(images().relu()).logits)


def test_widths_of_student_and_teacher_may_differ(student, teacher):
    pair = pair_of(student, teacher)
    assert (pair.student.embed_dim, pair.teacher.embed_dim) == (32, 64)
    heads = MAG(pair, build_objective(pair, "ce")).student_heads
    assert not heads.decoders
    assert [e[2].out_features for e in heads.encoders.values()] == [64, 256]
    assert heads.decode(heads.encode(torch.zeros(2, 32))) == {}


def test_a_distiller_without_a_teacher(student, teacher):
    pair = pair_of(student, teacher)
    terms, _ = Distiller(student, build_objective(pair, "ce"))(batch())
    assert list(terms) == ["ce"]
    for objective in (build_objective(pair, "kd"), MAG(pair, build_objective(pair, "ce"), SMALL)):
        with pytest.raises(ValueError, match="the objective reads the teacher's"):
            Distiller(student, objective)(batch())


def test_state_dict_round_trip(student, teacher):
    pair = pair_of(student, teacher)
    one = Distiller(student, MAG(pair, build_objective(pair, "ce", "kd", "fitnet"), SMALL)).eval()
    two = Distiller(tap("cifar_resnet8x05", 5), MAG(pair, build_objective(pair, "ce", "kd", "fitnet"), SMALL)).eval()
    two.load_state_dict(one.state_dict())
    theirs = teacher(images())
    (a, x), (b, y) = one(batch(), theirs), two(batch(), theirs)
    assert torch.equal(x, y)
    assert all(torch.equal(a[name], b[name]) for name in a)
