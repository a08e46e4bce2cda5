"""The embedded teacher is what the file beside it says, and its recipe is in the repository."""

import json
from pathlib import Path

import pytest
import yaml

import mgd_timm
from mgd_timm.recipe.data import EMBEDDED
from mgd_timm.storage.digests import sha256

TEACHER = EMBEDDED / "teacher"


@pytest.fixture(scope="module")
def origin():
    return json.loads((TEACHER / "recipe.json").read_text())


@pytest.mark.slow
def test_accuracy_on_the_embedded_test_images_is_the_recorded_one(origin):
    found = mgd_timm.evaluate("embedded")
    assert found["n"] == 4000
    assert found["top1"] == pytest.approx(origin["embedded_test"]["top1"], abs=0.03)  # one image, on another processor
    assert found["loss"] == pytest.approx(origin["embedded_test"]["loss"], rel=1e-3)


def test_weights_are_small_and_those_that_the_recipe_names(origin):
    assert (TEACHER / "model.safetensors").stat().st_size <= 2_000_000
    assert sha256(TEACHER / "model.safetensors") == origin["model_sha256"]


def test_the_recipe_in_the_repository_is_the_one_it_was_trained_with(origin):
    written = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "embedded_teacher.yaml").read_text())
    flat = {**origin["recipe"], **origin["recipe"]["data"], **origin["recipe"]["optim"]}
    flat |= {"model": flat["student"], "output": written["output"]}
    assert {name: flat[name] for name in written} == written
