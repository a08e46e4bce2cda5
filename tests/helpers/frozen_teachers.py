"""A live teacher compiled on a CPU has its weights as constants, and gives the features that it gives eagerly; run by
test_distiller."""

import copy

import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import KD, CrossEntropy, Objective
from mgd_timm.data.rng import set_seed
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher
from mgd_timm.features import Batch, Features, FeatureTap, Pair
from mgd_timm.granularity import MAS, GranularityHeads
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.loop import fit
from mgd_timm.training.options import FitOptions

SIZE, CLASSES, COUNT = (3, 16, 16), 5, 8
IMAGES = torch.randn(COUNT, *SIZE, generator=torch.Generator().manual_seed(0))


def make_teacher(seed: int) -> Teacher:
    """Return a teacher whose BatchNorms have statistics, and are not folded."""
    set_seed(seed)
    model = timm.create_model("cifar_resnet8", num_classes=CLASSES).train()
    for _ in range(20):
        model(torch.randn(32, *SIZE))
    tap = FeatureTap(model, "stages", input_size=SIZE)
    return Teacher(tap, GranularityHeads(tap.embed_dim, CLASSES))


def make_batch(count: int) -> Batch:
    return Batch(IMAGES[:count], torch.arange(count) % CLASSES, torch.arange(count))


def compiled(*teachers: Teacher):
    return LiveTeachers(*teachers).compile(COUNT, "default")


def tensors(features: Features) -> list[torch.Tensor]:
    return [part for part in tree_leaves(features) if part is not None]


def distance(found: Features, expected: Features) -> float:
    """Return the largest distance of two features' tensors, as a fraction of the expected norm."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert all(one.shape == two.shape for one, two in pairs)
    return max(((one.double() - two).norm() / two.double().norm()).item() for one, two in pairs)


def check_features() -> None:
    """Full micro-batches and those of one sample less are compiled; the teacher stays as it was, and can be called."""
    teacher = make_teacher(1)
    weights, before = list(teacher.parameters()), copy.deepcopy(teacher.state_dict())
    exact = copy.deepcopy(teacher).double()
    compute_features = compiled(teacher)
    for count in (COUNT, COUNT - 1, 3):
        batch = make_batch(count)
        expected = exact(batch.images.double())
        assert distance(compute_features(batch), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            found, eager = compute_features(batch), teacher(batch.images)
        assert distance(found, expected) < 3e-2
        assert [part.dtype for part in tensors(found)] == [part.dtype for part in tensors(eager)]
        assert distance(teacher(batch.images), expected) < 1e-5
    assert all(now is then for now, then in zip(teacher.parameters(), weights, strict=True))
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def check_constants() -> None:
    """What was compiled does not follow its teacher's weights; what is compiled later has those of its time."""
    teacher, other = make_teacher(1), make_teacher(2)
    batch = make_batch(COUNT)
    old = teacher(batch.images)
    first = compiled(teacher)
    assert distance(first(batch), old) < 1e-5
    teacher.load_state_dict(make_teacher(3).state_dict())
    new = teacher(batch.images)
    assert distance(first(batch), new) > 0.1
    for found, expected in zip(compiled(teacher, other)(batch), (new, other(batch.images)), strict=True):
        assert distance(found, expected) < 1e-5


def check_many() -> None:
    """Torch's limit of 8 compilations of a function, 7 of which were done above, leaves no teacher eager."""
    batch, before = make_batch(COUNT), counters["stats"]["unique_graphs"]
    for seed in range(3):
        teacher = make_teacher(seed)
        assert distance(compiled(teacher)(batch), teacher(batch.images)) < 1e-5
    assert counters["stats"]["unique_graphs"] == before + 3


class _Batches:
    digest, ids = "batches", torch.arange(COUNT)

    def batches(self, micro_batches, epoch, device):
        return (Batch(*(part[ids] for part in make_batch(COUNT))) for ids in micro_batches)


def check_student() -> None:
    """The student is no constant: it trains as it does eagerly."""
    students: list[nn.Module] = []
    teacher = make_teacher(1)
    for compiles in (False, True):
        set_seed(5)
        tap = FeatureTap(timm.create_model("cifar_resnet8x05", num_classes=CLASSES), input_size=SIZE)
        pair = Pair(tap.shapes(SIZE[1]), teacher.tap.shapes(SIZE[1]), COUNT)
        distiller = Distiller(tap, MAS(pair, Objective(task=(0.2, CrossEntropy(pair)), kd=(0.8, KD(pair)))))
        start = copy.deepcopy(distiller)
        optim, quiet = Optim(epochs=5, lr=0.05), FitOptions(quiet=True)
        options = {"seed": 0, "batch_size": COUNT, "teach": LiveTeachers(teacher), "options": quiet}
        fit(distiller, _Batches(), optim, Accelerator(), compile=compiles, **options)
        students.append(distiller)
    for eager, ours, then in zip(*(model.parameters() for model in (*students, start)), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)
        assert not torch.equal(ours, then)


def main() -> None:
    torch.set_num_threads(1)
    for check in (check_features, check_constants, check_many, check_student):
        check()
        print(check.__name__, flush=True)


if __name__ == "__main__":
    main()
