"""Values that follow from a recipe and the number of processes."""

import pytest

from mgd_timm.recipe.derived import with_global_batch
from mgd_timm.recipe.recipe import make_recipe


@pytest.mark.parametrize(
    ("options", "processes", "steps", "expected"),
    [
        ({"batch_size": 32}, 1, 1, 32),
        ({"batch_size": 32}, 3, 1, 96),
        ({"batch_size": 32, "grad_accum_steps": 2}, 3, 1, 192),
        ({"batch_size": 32}, 3, 4, 384),  # steps that the launcher asks for
        ({"batch_size": 32, "global_batch_size": 100}, 3, 1, 100),
        ({"batch_size": 32, "global_batch_size": 100, "grad_accum_steps": 2}, 3, 1, 100),
        ({"batch_size": 32, "global_batch_size": 20}, 4, 1, 20),
    ],
)
def test_a_recipe_fixes_the_global_batch(options, processes, steps, expected):
    found = with_global_batch(make_recipe(**options), processes, steps)
    assert (found.optim.global_batch_size, found.optim.grad_accum_steps) == (expected, None)
    for others in (1, 2, 5):
        assert with_global_batch(found, others, 7) == found
    assert with_global_batch(found, 1).optim.lr == make_recipe().optim.lr


def test_a_global_batch_that_steps_contradict_or_processes_share_out_to_less_than_two_is_refused():
    recipe = make_recipe(batch_size=32, global_batch_size=100, grad_accum_steps=3)
    message = (
        "grad_accum_steps=3 contradicts global_batch_size=100: 32 images x 2 processes x 3 micro-batches = 192, "
        "expected 2 micro-batches"
    )
    with pytest.raises(ValueError, match=message):
        with_global_batch(recipe, 2)
    with pytest.raises(ValueError, match="global_batch_size=7 on 4 processes: expected at least 2 images for each, 8"):
        with_global_batch(make_recipe(global_batch_size=7), 4)
    with pytest.raises(ValueError, match="global_batch_size=1: expected 2 or more"):
        make_recipe(global_batch_size=1)
