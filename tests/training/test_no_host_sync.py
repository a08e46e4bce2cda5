"""On a GPU no step makes the host wait, and nothing mixes devices.

Whole fits run on a GPU without values (helpers/fake_gpu.py), so on any machine: sources, teacher, heads, student,
losses, reports, optimizer, moving average and evaluation are the package's own, the forward pass and the backward
functions are those of CUDA under bf16 autocast. Not run are torch's engine, which needs a GPU (a loop in Python calls
the backward functions in its place), the kernel of fused SGD, `--compile`, fp16's loss scaler, and collectives: on
several processes CRD waits in each step for the numbers of rows of the others.

Every wait is counted. Those that are left are listed here with their reasons, by file: all are of a run, an epoch or an
evaluation, none of a step, except for KDSVD's decompositions.
"""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from cases import PAIR, batch, features, of_parts, parts
from fake_gpu import SMALL, FakeGpu, gpu_machine
from small import write_pictures
from timm import create_model
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mgd_timm.criteria import (
    CRD,
    CRITERIA,
    KD,
    OFA,
    CrossEntropy,
    EntropyWeight,
    MaskedGenerative,
    Objective,
    Standardised,
    Weighted,
)
from mgd_timm.data.dataset import load_images
from mgd_timm.data.mixed_source import MixedSource
from mgd_timm.data.sources import SmallImageSource, Source
from mgd_timm.distiller import Distiller, LiveTeachers, MutualLearning, TaughtPeers, Teacher
from mgd_timm.distributed.batchnorm_statistics import RunningStatistics
from mgd_timm.features import Batch, Features, FeatureTap, Pair, Shapes
from mgd_timm.granularity import MAG, MAS, GranularityHeads, HeadFitting
from mgd_timm.models.input_adapter import InputAdapter
from mgd_timm.objective import SeveralTeachers
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.optim import Optim
from mgd_timm.teachers.outputs.layout import Layout
from mgd_timm.teachers.outputs.memory import store_outputs
from mgd_timm.teachers.outputs.store import TeacherStore
from mgd_timm.teachers.outputs.stored_source import StoredSource, stored_teacher
from mgd_timm.training.evaluation import Metrics, evaluate, evaluate_taps
from mgd_timm.training.loop import fit
from mgd_timm.training.noise import evaluate_noise
from mgd_timm.training.options import FitOptions
from mgd_timm.training.step import Teach

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # a copy of a module asks for it
]

SIDE, TEACHER_SIDE, CLASSES, COUNT = 16, 20, 5, 6
OPTIM = Optim(epochs=1, clip_grad=1.0, model_ema=True, model_ema_warmup=True)
ROOMY_GPU, SMALL_GPU = 80 << 30, 1 << 10  # bytes that are free: all data fit, or none

MOVED_ONCE = Counter({"data/sources.py": 2})  # images and labels that the GPU then keeps
OF_PASS = Counter({"data/sources.py": 3})  # ids of all steps, mean and std, before the first of them
OF_EPOCH = Counter(
    {
        "training/report.py": 1,  # the losses of all steps since the last report, which is where they are checked
        "distributed/collectives.py": 2,  # whether any process is to stop: a flag to the GPU, and back
    }
)
OF_EVALUATION = Counter({"training/evaluation.py": 1})  # its result


def check(gpu: FakeGpu, expected: Counter[str]) -> None:
    assert gpu.waits == expected, f"the host waits at {dict(gpu.lines)}"


# -- criteria


def on_gpu(shapes: Shapes, grad: bool = False) -> Features:
    """Features as autocast leaves them."""
    tensors = parts(features(shapes, 1))
    made = {name: torch.empty(t.shape, dtype=torch.bfloat16, device="cuda") for name, t in tensors.items()}
    return of_parts({name: t.requires_grad_(grad) for name, t in made.items()})


OTHER_FORMS = {
    "crd with a queue": lambda pair: CRD(pair, queue=8),
    "crd, relaxed": lambda pair: CRD(pair, positives="relax"),
    "masked positions": lambda pair: MaskedGenerative(pair, mask="positions"),
    "standardised kd": lambda pair: Standardised(KD(pair)),
    "standardised ofa": lambda pair: Standardised(OFA(pair)),
    "smoothing": lambda pair: CrossEntropy(pair, smoothing=0.1),
}


@pytest.mark.parametrize("name", [*CRITERIA, *OTHER_FORMS])
def test_criteria_wait_for_nothing(name):
    """Two steps, forward and backward: a decomposition of KDSVD waits for each map of both networks."""
    torch.manual_seed(0)
    criterion = {**CRITERIA, **OTHER_FORMS}[name](PAIR)
    with gpu_machine("bf16") as (gpu, accelerator):
        gpu.put(criterion).train()
        shown = Batch(*(torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in batch()))
        for _ in range(2):
            with accelerator.autocast():
                loss = criterion(on_gpu(PAIR.student, grad=True), on_gpu(PAIR.teacher), shown)
                for part in criterion.teacher_parts(on_gpu(PAIR.teacher), shown).values():
                    loss = loss + part
            assert loss.device.type == "cuda"
            accelerator.backward(loss)
    assert all(p.grad is not None for p in criterion.parameters() if p.requires_grad)
    check(gpu, Counter({"criteria/kdsvd.py": 8} if name == "kdsvd" else {}))


# -- whole fits


class Setup:
    """Two networks, their shapes, and a source of six images with every augmentation of small images."""

    def __init__(self, count: int = COUNT) -> None:
        torch.manual_seed(0)
        self.student, self.network = tap("cifar_resnet8", SIDE), tap("cifar_resnet8x4", TEACHER_SIDE)
        labels = torch.arange(count) % CLASSES
        shapes = self.student.shapes(SIDE), self.network.shapes(TEACHER_SIDE)
        self.pair = Pair(*shapes, count, labels, self.network.classifier)
        self.heads = GranularityHeads(self.network.embed_dim, CLASSES)
        half = (0.5,) * 3
        adapter = InputAdapter(half, half, (0.4,) * 3, (0.3,) * 3, (TEACHER_SIDE, TEACHER_SIDE))
        self.teacher = Teacher(self.network, self.heads, input_adapter=adapter, digest="of no cache")
        data = Data(pad=2, reprob=0.5, recount=2, mixup=0.2, cutmix=1.0)
        images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8)
        stats = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)
        self.images = SmallImageSource(images, labels, torch.arange(count), "images", data, stats, seed=0)
        self.mixed = MixedSource(self.images, data, 0, count, CLASSES)

    def objective(self, method: str, names: tuple[str, ...] = ("ce", "kd", "at", "rkd", "crd")) -> Objective | MAG:
        """Criteria, each with a warm-up, in MAG or MAS."""
        objective = Objective(**{name: (1.0, CRITERIA[name](self.pair), 1.0) for name in names})
        return objective if method == "none" else {"mag": MAG, "mas": MAS}[method](self.pair, objective)


def tap(name: str, side: int) -> FeatureTap:
    return FeatureTap(create_model(name, num_classes=CLASSES), "stages", input_size=(3, side, side), cam=True)


def train(
    trainee: nn.Module, source: Source, accelerator: Accelerator, *, teach: Teach | None, student: FeatureTap | None
) -> None:
    """Fit for an epoch of two updates, of one or two micro-batches; a student is then evaluated, in two batches."""

    def evaluate_average(averaged: nn.Module | None) -> Metrics:
        assert averaged is not None
        images = source.source if isinstance(source, MixedSource | StoredSource) else source
        return evaluate_taps({"student": averaged}, images, accelerator, 4)["student"]

    fit(
        trainee,
        source,
        OPTIM,
        accelerator,
        seed=0,
        batch_size=3,
        teach=teach,
        evaluate=evaluate_average if student is not None else None,
        averaged=student,
        options=FitOptions(quiet=True, track=False),
    )


OF_FIT = OF_PASS + OF_EPOCH + OF_PASS + OF_EVALUATION


@pytest.mark.parametrize(("images", "steps"), [("on the GPU", 1), ("on the host", 2)])
def test_updates_wait_for_nothing(images, steps):
    """From images that lie on the GPU or are transferred in each step; of one micro-batch, or of two."""
    setup = Setup(COUNT * steps)
    trainee = Distiller(setup.student, setup.objective("mas"))
    memory = SMALL_GPU if images == "on the host" else ROOMY_GPU
    with gpu_machine("bf16", steps, memory) as (gpu, accelerator):
        gpu.put(trainee)
        teach = LiveTeachers(gpu.put(setup.teacher))
        train(trainee, setup.mixed, accelerator, teach=teach, student=setup.student)
    labels_alone = Counter({"data/sources.py": 1})
    check(gpu, OF_FIT + (MOVED_ONCE if images == "on the GPU" else labels_alone))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "mag", "mas"])
def test_updates_with_every_criterion_wait_for_nothing(method):
    setup = Setup()
    # A step of its own needs gradients of gradients, for which torch's engine needs a device with streams.
    names = tuple(name for name, kind in CRITERIA.items() if not kind.own_step)
    trainee = Distiller(setup.student, setup.objective(method, names))
    with gpu_machine("bf16") as (gpu, accelerator):
        gpu.put(trainee)
        teach = LiveTeachers(gpu.put(setup.teacher), rotate=True)
        train(trainee, setup.mixed, accelerator, teach=teach, student=setup.student)
    decompositions = 2 * len(setup.student.indices) * (COUNT // 3)
    check(gpu, OF_FIT + MOVED_ONCE + Counter({"criteria/kdsvd.py": decompositions}))


@pytest.mark.slow
def test_a_transformer_waits_for_nothing():
    setup = Setup()
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = create_model("vit_tiny_patch16_224", num_classes=CLASSES, drop_path_rate=0.1, **sizes)
    student = FeatureTap(model, [0, 1, 2], input_size=(3, SIDE, SIDE))
    setup.pair = setup.pair._replace(student=student.shapes(SIDE))
    trainee = Distiller(student, setup.objective("mas", ("ce", "kd", "ofa", "sp")))
    with gpu_machine("bf16") as (gpu, accelerator):
        gpu.put(trainee)
        teach = LiveTeachers(gpu.put(setup.teacher))
        train(trainee, setup.mixed, accelerator, teach=teach, student=student)
    check(gpu, OF_FIT + MOVED_ONCE)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [True, False])
def test_several_teachers_wait_for_nothing(mean):
    setup = Setup()
    parts = [setup.objective("mas", ("ce", "kd")), MAG(setup.pair, None)]
    trainee = Distiller(setup.student, SeveralTeachers(parts, (0.5, 0.5), mean=mean))
    with gpu_machine("bf16") as (gpu, accelerator):
        gpu.put(trainee)
        teacher = gpu.put(setup.teacher)
        train(trainee, setup.mixed, accelerator, teach=LiveTeachers(teacher, teacher), student=setup.student)
    check(gpu, OF_FIT + MOVED_ONCE)


@pytest.mark.slow
def test_mutual_learning_waits_for_nothing():
    setup = Setup()
    pair = Pair(setup.pair.student, setup.pair.student)
    objectives = [
        MAG(pair, Objective(**{name: (1.0, CRITERIA[name](pair)) for name in ("ce", "dml")})) for _ in range(2)
    ]
    trainee = MutualLearning(setup.student, tap("cifar_resnet8", SIDE), *objectives)
    with gpu_machine("bf16") as (gpu, accelerator):
        gpu.put(trainee)
        train(trainee, setup.mixed, accelerator, teach=None, student=setup.student)
    check(gpu, OF_FIT + MOVED_ONCE)


@pytest.mark.slow
def test_two_students_of_a_teacher_with_weighted_samples_wait_for_nothing():
    setup, peer = Setup(), tap("cifar_resnet8", SIDE)
    pairs = setup.pair, setup.pair._replace(student=peer.shapes(SIDE))
    taught = [
        MAS(
            pair,
            Objective(ce=(1.0, CRITERIA["ce"](pair)), kd=(1.0, Weighted(CRITERIA["kd"](pair), EntropyWeight()))),
            sample_weight=EntropyWeight(),
        )
        for pair in pairs
    ]
    between = [Objective(dml=(1.0, CRITERIA["dml"](Pair(pair.student, pair.student)))) for pair in pairs]
    trainee = TaughtPeers(setup.student, peer, *taught, *between)
    with gpu_machine("bf16") as (gpu, accelerator):
        gpu.put(trainee)
        train(trainee, setup.mixed, accelerator, teach=LiveTeachers(gpu.put(setup.teacher)), student=setup.student)
    check(gpu, OF_FIT + MOVED_ONCE)


def test_large_images_wait_once_a_pass(tmp_path):
    """The batches of a source alone: DataLoader pins their memory, here in this process."""
    data = Data(data_dir=str(write_pictures(tmp_path, count=COUNT)), workers=0)
    images = load_images(data, 0)
    with gpu_machine("bf16") as (gpu, accelerator):
        shown = [
            shown
            for epoch in range(2)
            for shown in images.train.batches(images.train.ids.split(3), epoch, accelerator.device)
        ]
    assert all(part.device.type == "cuda" for batch in shown for part in batch)
    assert len(shown) == 2 * COUNT // 3
    assert shown[0].images.nbytes > SMALL
    of_pass = Counter({"data/sources.py": 1, "data/transforms.py": 2})  # ids of all steps; mean and std
    check(gpu, of_pass + of_pass)


@pytest.fixture
def two_processes():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def test_statistics_of_several_processes_wait_for_nothing(two_processes):
    model = create_model("cifar_resnet8", num_classes=CLASSES).train()
    with FakeGpu() as gpu:
        gpu.put(model)
        statistics = RunningStatistics(model)
        before = statistics.snapshot()
        model(torch.zeros(2, 3, SIDE, SIDE, device="cuda"))
        statistics.merge(before, 2, 0)
    check(gpu, Counter())


# -- stored outputs of a teacher


@pytest.mark.parametrize("outputs", ["on the GPU", "on the host"])
def test_head_fitting_on_outputs_in_memory_waits_for_nothing(outputs):
    """Outputs that the GPU has no room for are copied to the host once, as they are made."""
    setup = Setup()
    heads, setup.teacher.heads = setup.heads, None
    trainee = HeadFitting(heads).requires_grad_(True)
    memory = SMALL_GPU if outputs == "on the host" else ROOMY_GPU
    with gpu_machine("bf16", free_memory=memory) as (gpu, accelerator):
        teacher = gpu.put(setup.teacher)
        gpu.put(trainee)
        stored = store_outputs(lambda batch: teacher(batch.images), setup.images, 2, accelerator, 3, quiet=True)
        train(trainee, stored, accelerator, teach=stored.features, student=None)
        evaluate(lambda batch: {"logits": stored.features(batch).logits}, ("logits",), stored, accelerator, 4)
    fitted = OF_PASS + OF_PASS + OF_EPOCH + OF_EVALUATION
    if outputs == "on the GPU":
        check(gpu, fitted + MOVED_ONCE + Counter({"teachers/outputs/memory.py": 1}))  # labels
    else:
        copied = Counter({"teachers/outputs/memory.py": 2 * 2 * COUNT // 3, "data/sources.py": 1})
        check(gpu, fitted + copied)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 2])
def test_distilling_from_a_store_waits_for_nothing(top_k, tmp_path):
    """The store is written once, to files: the host waits for each batch then."""
    setup = Setup()
    trainee = Distiller(setup.student, setup.objective("mas", ("ce", "kd", "rkd")))
    with gpu_machine("bf16") as (gpu, accelerator):
        layout = Layout(setup.network.embed_dim, CLASSES, top_k)
        source = StoredSource(setup.images, TeacherStore(tmp_path / "store", {}, layout, COUNT, 2, accelerator))
        gpu.put(trainee)
        source.fill(gpu.put(setup.teacher), accelerator, 4, quiet=True)
        gpu.waits.clear()
        train(trainee, source, accelerator, teach=stored_teacher(setup.heads), student=setup.student)
    check(gpu, OF_FIT)


# -- evaluation


class OnGpu(nn.Sequential):
    """A module that is on the GPU and cannot be moved there again, as it is without values."""

    def to(self, *_: object) -> "OnGpu":
        return self


def test_an_evaluation_waits_once():
    setup = Setup()
    with gpu_machine("bf16") as (gpu, accelerator):
        taps = {"student": gpu.put(setup.student), "teacher": gpu.put(setup.teacher)}
        evaluate_taps(taps, setup.images, accelerator, 4)
    check(gpu, OF_EVALUATION + OF_PASS + MOVED_ONCE)


def test_an_evaluation_under_noise_waits_once():
    setup = Setup()
    with gpu_machine("no") as (gpu, accelerator):
        model = gpu.put(OnGpu(setup.student.model))
        evaluate_noise(model, setup.images, accelerator, 4, std=(0.5,) * 3, noise=(0.1, 0.2), seeds=2)
    standard_deviation = Counter({"training/noise.py": 1})
    check(gpu, OF_EVALUATION + OF_PASS + MOVED_ONCE + standard_deviation)
