"""Match the channels of a teacher's maps to the student's before the run (Han et al. 2021)."""

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mgd_timm.data.sources import epoch_ids
from mgd_timm.distiller import Teacher
from mgd_timm.distributed.collectives import gathered, several_processes
from mgd_timm.distributed.hangs import print_stacks_before_timeout
from mgd_timm.features import FeatureTap, Shapes
from mgd_timm.features.probe import eval_without_gradients
from mgd_timm.storage.digests import module_digest
from mgd_timm.teachers.pretraining import RunContext, load_or_fit
from mgd_timm.training.evaluation import Metrics

CONSTANT = 1e-6  # a channel whose responses vary less than this share of their size correlates with nothing


class ChannelMatching(nn.Module):
    """Channel matching: the channels of the teacher's maps are re-ordered to those of the student that respond alike.

    Channel c of a teacher and channel c of a student respond to different images, so that a loss that compares channel
    by channel asks the student to re-order its own. Before the run both networks are shown N training images (the
    student as it is initialised). The mean over positions of each channel is correlated over the images, and each
    channel of the student gets one of the teacher's, such that the sum of the correlations is largest (the Hungarian
    method). Each channel of a wider teacher that is left goes to the student's channel that it correlates best with,
    and channels that share one are averaged. Every criterion reads the maps in the new order; logits and embedding
    stay.

    It matters only to criteria that compare channels without an adapter: afds and kdsvd, which have none where channels
    are equal, as they are after the matching, and fitnet with fitnet.adapter=false. The adapters of fitnet, vid,
    reviewkd and masked_generative can learn any order, and at, sp and nst do not depend on it; of a wider teacher they
    read the averages.

    Reference: Han, Gao, Wang, Li, Li, Wang, "Fixing the Teacher-Student Knowledge Discrepancy in Distillation" (arXiv
    2103.16844).

    Differs: inspired by the paper, of which only the abstract was read; the rule of matching and its constants are this
    package's. The matching is found once, of an untrained or pretrained student.

    Args:
        student: Shapes of the student, whose maps pair with the teacher's one to one.
        teacher: Shapes of the teacher.
    """

    def __init__(self, student: Shapes, teacher: Shapes) -> None:
        super().__init__()
        self.count = len(student.maps)
        for i, (ours, theirs) in enumerate(zip(student.maps, teacher.maps, strict=True)):
            self.register_buffer(f"matrix_{i}", torch.zeros(ours[0], theirs[0]))

    def matrices(self) -> list[Float[Tensor, "s t"]]:
        """Return the share of each of the teacher's channels in each of the student's, map by map."""
        return [self.get_buffer(f"matrix_{i}") for i in range(self.count)]

    def forward(self, maps: tuple[Float[Tensor, "b _ _ _"], ...]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """Return the maps with the student's channels."""
        pairs = zip(maps, self.matrices(), strict=True)
        return tuple(F.conv2d(one, matrix[:, :, None, None].to(one.dtype)) for one, matrix in pairs)


def match_shapes(student: Shapes, teacher: Shapes) -> Shapes:
    """Return a teacher's shapes as channel matching leaves them.

    Raises:
        ValueError: The numbers of maps differ, or a map of the teacher has fewer channels than the student's.
    """
    ours, theirs = ([shape[0] for shape in shapes.maps] for shapes in (student, teacher))
    if len(ours) != len(theirs):
        raise ValueError(
            f"match_channels pairs maps one to one: the student has {len(ours)} {student.maps}, the teacher "
            f"{len(theirs)} {teacher.maps}. Choose maps that both have (--maps stages or --maps last)."
        )
    if any(one > other for one, other in zip(ours, theirs, strict=True)):
        raise ValueError(
            f"match_channels gives each channel of the student one or more of the teacher's: the student's maps have "
            f"{ours} channels, and the teacher's {theirs}, fewer in one or more. Choose other maps (--maps), a wider "
            "teacher, or leave --match-channels out."
        )
    pairs = zip(student.maps, teacher.maps, strict=True)
    return teacher._replace(maps=tuple((one[0], *other[1:]) for one, other in pairs))


def correlate(student: Float[Tensor, "n s"], teacher: Float[Tensor, "n t"]) -> Float[Tensor, "s t"]:
    """Return Pearson's correlation of each pair of channels over n images, in float64; 0 for a constant channel."""

    def normalised(responses: Tensor) -> Tensor:
        responses = responses.double()
        centred = responses - responses.mean(0)
        norm = centred.norm(dim=0)
        return torch.where(norm > CONSTANT * responses.norm(dim=0), centred / norm, 0)

    return normalised(student).T @ normalised(teacher)


def assign_channels(correlation: Float[Tensor, "s t"]) -> Float[Tensor, "s t"]:
    """Return the share of each of t channels in each of s <= t channels: rows sum to 1, columns have one entry.

    The s pairs with the largest sum of correlations are found by the Hungarian method; each other column goes to the
    row that it correlates best with. Columns of a row have equal shares.
    """
    from scipy.optimize import linear_sum_assignment  # an extra

    rows, columns = map(torch.from_numpy, linear_sum_assignment(correlation.numpy(), maximize=True))
    best = correlation.argmax(0)
    best[columns] = rows
    assigned = F.one_hot(best, len(correlation)).T.to(correlation.dtype)
    return assigned / assigned.sum(1, keepdim=True)


def check_solver() -> None:
    """Raise ValueError if scipy, which solves the assignment, is not installed."""
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("match_channels needs scipy, which is not installed: pip install mgd-timm[match].")


def match_channels(teacher: Teacher, student: FeatureTap, images: int, context: RunContext) -> Teacher:
    """Return the teacher with the channels of its maps matched to those of the student as it is now.

    The matching is loaded from the cache where a digest of all that makes it matches.

    Args:
        teacher: With its final weights.
        student: Before it is trained.
        images: Number of training images: the first ones of the run's first epoch, augmented as there.
        context: Of the run.
    """
    device, input_size = context.accelerator.device, context.images.input_size[1:]
    student.to(device)
    matching = ChannelMatching(student.shapes(input_size), teacher.tap.shapes(teacher.size(input_size))).to(device)
    made_of = {
        **context.teacher_fingerprint(teacher),
        "student": [student.name, module_digest(student.model)],
        "maps": [list(student.indices), list(teacher.tap.indices)],
        "matched": images,
    }

    def find() -> Metrics:
        responses = _collect_responses(teacher, student, images, context)
        found = {}
        for i, (matrix, *pair) in enumerate(
            zip(matching.matrices(), responses[: matching.count], responses[matching.count :], strict=True)
        ):
            correlation = correlate(*pair)
            shares = assign_channels(correlation)
            matrix.copy_(shares)
            found[f"map_{i + 1}"] = float((shares * correlation).sum() / len(shares))
        return found

    found = load_or_fit("channels", matching, made_of, context.accelerator, find)
    means = ", ".join(f"{value:.2f}" for value in found.metrics.values())
    context.accelerator.print(
        f"channels of {matching.count} maps matched on {min(images, len(context.images.train.ids))} images"
        f"{' (from the cache)' if found.from_cache else ''}; mean correlation: {means}. A criterion with an adapter "
        "(fitnet, vid, reviewkd) can learn any order, and one that sums over channels (at, sp) does not depend on it."
    )
    return teacher.with_channels(matching)


def _collect_responses(teacher: Teacher, student: FeatureTap, images: int, context: RunContext) -> list[Tensor]:
    """Return the mean over positions of each map for each image, [images, channels]: the student's, then the
    teacher's."""
    accelerator, train = context.accelerator, context.images.train
    ids = epoch_ids(train, context.seed, 0)[: max(images, accelerator.num_processes)]
    parts = ids[accelerator.process_index :: accelerator.num_processes].split(context.data.validation_batch_size)
    batches = train.batches(parts, 0, accelerator.device)
    found = []
    with eval_without_gradients(student), print_stacks_before_timeout(accelerator) as start_step:
        for _ in parts:
            start_step()
            shown = next(batches).images
            found.append([maps.mean((2, 3)) for maps in (*student(shown).maps, *teacher(shown).maps)])
        responses = [torch.cat(rows) for rows in zip(*found, strict=True)]
        if several_processes():
            responses = gathered(*responses)
    return [one.cpu() for one in responses]
