"""Connect a teacher in training with the blocks of its student (--for-student)."""

from mgd_timm.criteria.terms import Terms, build_criterion
from mgd_timm.data.dataset import Images
from mgd_timm.features import FeatureTap, Pair
from mgd_timm.models.build import build_student
from mgd_timm.recipe.recipe import Recipe
from mgd_timm.teachers.student_friendly import StudentFriendly, build_branches


def connect_branches(recipe: Recipe, terms: Terms, tap: FeatureTap, pair: Pair, images: Images) -> StudentFriendly:
    """Return the objective of a teacher that is trained for a student, with branches into it."""
    name = recipe.for_student
    assert name is not None
    branches, note = build_branches(
        tap, name, lambda: build_student(name, images.input_size, images.num_classes), images.input_size
    )
    return StudentFriendly(
        build_criterion(terms.by_name["task"], pair),
        branches,
        weights=recipe.for_student_weights,
        temperature=recipe.for_student_temperature,
        divergence=recipe.for_student_divergence,
        note=note,
    )
