"""A teacher, its images, and its store."""

import pytest

from mgd_timm.data.dataset import load_images
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.plan import accelerator_of, fix_global_batch, store_options_of
from mgd_timm.recipe.derived import with_store_defaults
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.outputs import store as teacher_store
from mgd_timm.teachers.outputs.stored_source import open_store


@pytest.fixture(scope="module")
def bench(small_data):
    """Accelerator, images, the embedded teacher, and `open(folder, **options)`, which makes a store of 4 shards a
    view."""
    recipe = make_recipe(data_dir=str(small_data))
    accelerator = accelerator_of(recipe)
    recipe = fix_global_batch(recipe, accelerator)
    teacher = Teacher(FeatureTap(load_model("embedded"), input_size=(3, 28, 28)))
    default = load_images(recipe.data, 0)

    def opened(folder, views=2, *, teacher=teacher, images=None, accelerator=accelerator, **options):
        flags = {"data_dir": str(small_data), "teacher_store": str(folder), "teacher_augmentations": views, **options}
        recipe = with_store_defaults(make_recipe(**flags))
        if images is None:
            images = default if "pad" not in options else load_images(recipe.data, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher_store, "SHARD_ROWS", 100)
            return open_store(store_options_of(recipe), teacher, images, accelerator)

    def filled(folder, views=2, **options):
        stored = opened(folder, views, **options)
        stored.fill(options.get("teacher", teacher), accelerator, 50, quiet=True)
        return stored

    return accelerator, default, teacher, opened, filled


@pytest.fixture(scope="module")
def written(bench, tmp_path_factory):
    """A filled store of two views, not to be changed."""
    folder = tmp_path_factory.mktemp("written") / "store"
    bench[-1](folder)
    return folder
