"""Teachers as they come: of other classes, without a classifier, of another size, or several; through whole runs."""

import copy
import json
import math
from dataclasses import replace

import pytest
import timm
import torch
from accelerate import Accelerator
from small import ONE_IMAGE

import mgd_timm
from mgd_timm.data.dataset import load_images
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap, extract_with_rotations
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.connect import connect, finish_teachers
from mgd_timm.pipeline.evaluate_teachers import near_chance
from mgd_timm.pipeline.fit_criteria import fit_criteria
from mgd_timm.pipeline.load_teachers import adapt_teachers_to_data, load_teachers
from mgd_timm.pipeline.plan import classifier_fit_of, context_of, terms_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.storage.digests import module_digest
from mgd_timm.teachers.classifier import fit_classifiers
from mgd_timm.teachers.heads import fit_heads, outputs_once
from mgd_timm.teachers.outputs.memory import StoredPasses

pytestmark = pytest.mark.slow

SHORT = {"epochs": 1, "heads_epochs": 2, "heads_augmentations": 1}
PLAIN = {**SHORT, "method": "none", "criterion": ("at",), "kd_weight": 0.0, "maps": "last"}


def mute_teacher() -> torch.nn.Module:
    """The embedded teacher's backbone: an encoder that knows the images, and no classes."""
    model = load_model("embedded")
    model.reset_classifier(0)
    return model


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_teacher_without_a_classifier_teaches_by_views_that_are_fitted_on_the_labels(small_data, tmp_path, capsys):
    heads = {"heads_epochs": 16, "heads_batch_size": 32}
    mgd_timm.distill(mute_teacher(), data=str(small_data), output=tmp_path / "run", **SHORT | heads)
    said = capsys.readouterr().out
    assert "has no logits of these classes" in said
    heads = summary(tmp_path / "run")["heads"]
    assert "teacher" not in heads
    assert "teacher_top1" not in summary(tmp_path / "run")
    assert heads["top1"] > 60  # of 10 classes, from 320 labels


def test_a_teacher_without_a_classifier_serves_mag_and_feature_criteria(small_data, tmp_path):
    for method in ("none", "mag"):
        mgd_timm.distill(mute_teacher(), data=str(small_data), output=tmp_path / method, **PLAIN | {"method": method})
        assert summary(tmp_path / method)["top1"] is not None


@pytest.mark.parametrize(
    "options", [{"method": "none"}, {"method": "mag"}, {"method": "mas", "teacher_store": "store"}]
)
def test_what_reads_logits_is_refused_of_a_teacher_without_them(small_data, tmp_path, options):
    options = {**options, **({"teacher_store": str(tmp_path / "store")} if "teacher_store" in options else {})}
    with pytest.raises(
        ValueError, match=r"no classifier, and kd reads its logits.*fit-teacher-head|shows no logits.*--teacher-store"
    ):
        mgd_timm.distill(mute_teacher(), data=str(small_data), output=tmp_path / "run", **SHORT, **options)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_teaches_features_or_without_its_logits(small_data, tmp_path):
    torch.manual_seed(0)
    other = timm.create_model("cifar_resnet8", num_classes=7)
    with pytest.raises(
        ValueError, match=r"has 7 classes, the data 10, and kd reads its logits.*--teacher-classes auto or FILE"
    ):
        mgd_timm.distill(other, data=str(small_data), output=tmp_path / "run", **SHORT)
    mgd_timm.distill(other, data=str(small_data), output=tmp_path / "maps", **PLAIN)
    mgd_timm.distill(other, data=str(small_data), output=tmp_path / "views", teacher_classes="none", **SHORT)
    assert "teacher" not in summary(tmp_path / "views")["heads"]


def test_a_files_rows_put_a_shuffled_teacher_right(small_data, tmp_path):
    """The embedded teacher with its classes in another order and two more, which only the file knows."""
    model = load_model("embedded")
    right = mgd_timm.evaluate(model, str(small_data))["top1"]
    classifier = model.get_classifier()
    order = [7, 3, 9, 0, 2, 4, 1, 8, 5, 6]
    weight, bias = classifier.weight.detach(), classifier.bias.detach()
    with torch.no_grad():
        model.reset_classifier(12)
        model.get_classifier().weight[torch.tensor(order) + 2] = weight
        model.get_classifier().bias[torch.tensor(order) + 2] = bias
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k != "label_names"} | {"num_classes": 12}
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(str(row + 2) for row in order))
    mgd_timm.distill(
        model, data=str(small_data), output=tmp_path / "run", teacher_classes=str(file), **SHORT | {"method": "none"}
    )
    assert summary(tmp_path / "run")["teacher_top1"] == pytest.approx(right, abs=ONE_IMAGE)
    origin = json.loads((tmp_path / "run" / "export" / "recipe.json").read_text())
    assert origin["teacher_loaded_sha256"] == module_digest(model) != origin["teacher_sha256"]
    # Beside another one, each teacher by a word of its own; and one word for all does not fit both.
    two = {"teacher": [load_model("embedded"), model], "data": str(small_data), **SHORT, "method": "none"}
    mgd_timm.distill(**two, output=tmp_path / "two", teacher_classes=["auto", str(file)])
    assert summary(tmp_path / "two")["teacher_top1"] == pytest.approx([right, right], abs=ONE_IMAGE)
    with pytest.raises(
        ValueError, match=r"teacher 'module:cifar_resnet20:\w+': --teacher-classes auto: the names .* are not known"
    ):
        mgd_timm.distill(**two, output=tmp_path / "auto", teacher_classes="auto")


@pytest.mark.parametrize(("way", "lr"), [("probe", 0.01), ("finetune", 0.005)])
def test_a_teachers_head_is_fitted_first_and_found_again(small_data, tmp_path, capsys, way, lr):
    options = {
        "fit_teacher_head": way,
        "fitting_epochs": 4,
        "fitting_lr": lr,
        **SHORT,
        "method": "none",
        "batch_size": 32,
    }
    digests = []
    for name in ("one", "two"):
        mgd_timm.distill(mute_teacher(), data=str(small_data), output=tmp_path / name, **options)
        found = summary(tmp_path / name)
        assert found["teacher_top1"] > 60
        assert found["teacher_head"][0]["task"] < 1.5
        digests.append(json.loads((tmp_path / name / "export" / "recipe.json").read_text())["teacher_sha256"])
        assert ("from the cache" in capsys.readouterr().out) == (name == "two")
    assert digests[0] == digests[1]


@pytest.mark.parametrize("given", [{}, {"decay_milestones": (5, 6, 7)}])
def test_the_schedule_of_fine_tuning_follows_its_length(small_data, tmp_path, given):
    """8 epochs with decays at 5, 6 and 7, so 4 epochs with decays at 2.5, 3 and 3.5."""
    options = {"fit_teacher_head": "finetune", "fitting_epochs": 4, "epochs": 8, "sched": "multistep", "batch_size": 32}
    recipe = make_recipe(data_dir=str(small_data), output=str(tmp_path), **options, **given)
    images = load_images(recipe.data, recipe.seed, log=lambda _: None)
    teacher = Teacher(FeatureTap(load_model("embedded"), input_size=images.input_size))
    fit_classifiers([teacher], classifier_fit_of(recipe), context_of(recipe, images, Accelerator(), quiet=True))
    rows = (tmp_path / "teacher_head" / "metrics.jsonl").read_text().splitlines()
    # A row has the rate of its epoch's last update, which timm lowers one early.
    assert [json.loads(row)["lr"] for row in rows] == pytest.approx([5e-3, 5e-3, 5e-5, 5e-6])


def test_a_teacher_sees_the_same_crop_at_a_size_of_its_own(small_data, tmp_path):
    recipe = make_recipe(data_dir=str(small_data))
    images = load_images(recipe.data, 0, log=lambda _: None)
    batch = next(images.train.batches([images.train.ids[:3]], 0, torch.device("cpu")))
    from mgd_timm.models.input_adapter import build_input_adapter

    model = load_model("embedded")
    view = build_input_adapter(model, images.mean, images.std, images.input_size, 56)
    assert view(batch.images).shape[2:] == (56, 56)
    teacher = Teacher(FeatureTap(model), input_adapter=view)
    expected = torch.nn.functional.interpolate(
        view.scale * batch.images + view.shift, (56, 56), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(teacher(batch.images).embedding, FeatureTap(model).eval()(expected).embedding)
    mgd_timm.distill(
        model, data=str(small_data), output=tmp_path / "run", teacher_img_size=56, **SHORT | {"method": "none"}
    )
    assert summary(tmp_path / "run")["teacher_top1"] != mgd_timm.evaluate(model, str(small_data))["top1"]


def test_a_fixed_teachers_position_embeddings_are_resized_where_that_is_asked(small_data):
    images = load_images(make_recipe(data_dir=str(small_data), img_size=32).data, 0, log=lambda _: None)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    adapt_teachers_to_data([model], make_recipe(teacher_resize="positions"), images)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    fixed = timm.create_model("levit_128s", num_classes=10)
    with pytest.raises(
        ValueError, match="cannot be set to another input size: let the images be resized to its 224 pixels"
    ):
        adapt_teachers_to_data([fixed], make_recipe(teacher_resize="positions"), images)


def test_two_teachers_with_heads_of_their_own(small_data, tmp_path):
    """As the mean of probabilities; one of them has no classifier, and takes part by its views."""
    teachers = [load_model("embedded"), mute_teacher()]
    mgd_timm.distill(teachers, data=str(small_data), output=tmp_path / "run", teacher_weights=(0.75, 0.25), **SHORT)
    found = summary(tmp_path / "run")
    assert found["heads_1"]["teacher"] == pytest.approx(found["teacher_top1"][0], abs=ONE_IMAGE)
    assert found["teacher_top1"][1] is None
    assert "teacher" not in found["heads_2"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[-1]["train"]) == {
        "task",
        "kd",
        "top1",
        *(f"{name}_{i}" for name in ("abstract", "detailed") for i in (1, 2)),
    }
    assert len(json.loads((tmp_path / "run" / "export" / "recipe.json").read_text())["teacher_sha256"]) == 2


def test_several_teachers_on_the_command_line(small_data, tmp_path, capsys):
    from mgd_timm.cli.main import main

    words = [
        "distill",
        "--teacher",
        "embedded",
        "--teacher",
        "embedded",
        "--data-dir",
        str(small_data),
        "--epochs",
        "1",
    ]
    words += ["--method", "none", "--criterion", "at", "--maps", "last", "--output", str(tmp_path / "run")]
    assert main(words) == 1
    assert "at reads a teacher's maps, of which several have no mean: give --teachers-as sum" in capsys.readouterr().err
    assert main([*words, "--teachers-as", "sum"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"at_1", "at_2"} < set(rows[-1]["train"])
    assert capsys.readouterr().out.count("teacher cifar") == 2


def of_other_classes() -> torch.nn.Module:
    """As many classes as the data's, of other names."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet8", num_classes=10)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": tuple("abcdefghij")}
    return model


def finished(recipe, images, teachers):
    networks = connect(recipe, terms_of(recipe), images, Accelerator(), teachers)
    return finish_teachers(networks, fold=recipe.fold_teacher, fitted=False)


def networks_of(model, small_data, **options):
    recipe = make_recipe(data_dir=str(small_data), **options)
    images = load_images(recipe.data, 0, log=lambda _: None)
    teachers = load_teachers(recipe, [model])
    adapt_teachers_to_data(teachers, recipe, images)
    return finished(recipe, images, teachers)


def test_as_many_other_classes_are_other_classes(small_data):
    with pytest.raises(ValueError, match=r"class 0 is 'a' to the teacher.*and kd reads its logits.*fit-teacher-head"):
        networks_of(of_other_classes(), small_data, method="none")
    assert not networks_of(of_other_classes(), small_data, **PLAIN).teachers[0].has_logits
    model = of_other_classes()
    before = module_digest(model)
    fitted = networks_of(model, small_data, method="none", fit_teacher_head="probe").teachers[0]
    assert fitted.has_logits
    assert fitted.digest != before == module_digest(model)  # a new classifier; and the caller's network stays as it was


def test_a_fit_before_the_run_holds_no_second_copy_of_the_teacher(small_data):
    networks = networks_of(None, small_data, criterion=("ft",))
    assert networks.criterion_fits[0].teacher is networks.teachers[0]


def test_one_pass_over_the_teacher_fits_its_heads_and_the_one_of_a_criterion(small_data, tmp_path):
    """Each image and its three rotations in each augmentation, whatever the epochs."""
    options = {"criterion": ("sskd",), "heads_augmentations": 2, "heads_epochs": 4, "fitting_epochs": 3}
    recipe = make_recipe(data_dir=str(small_data), output=str(tmp_path), fold_teacher=False, batch_size=32, **options)
    accelerator = Accelerator()
    images = replace(load_images(recipe.data, 0, log=lambda _: None), val=None, test=None)
    networks = connect(recipe, terms_of(recipe), images, accelerator, load_teachers(recipe, ()))
    context = context_of(recipe, images, accelerator, quiet=True)
    teacher, count = networks.teachers[0], []
    teacher.tap.register_forward_pre_hook(lambda _, inputs: count.append(len(inputs[0])))
    outputs = outputs_once(teacher, recipe.heads, context, rotate=True)
    fit_heads(teacher, recipe.heads, context, outputs=outputs)
    metrics = fit_criteria(networks.criterion_fits, recipe.optim, 3, (0.0, None), context, outputs)
    assert sum(count) == 4 * 2 * len(images.train.ids)
    assert 0 < metrics["sskd"]["source"] < math.log(32)
    first, second = (
        next(StoredPasses(outputs(), len(images.train.ids)).batches([torch.arange(3)], epoch, accelerator.device))
        for epoch in (0, 3)
    )
    for epoch, stored in ((0, first), (1, second)):
        shown = next(iter(images.train.batches([images.train.ids[:3]], epoch, accelerator.device)))
        expected = extract_with_rotations(teacher, shown.images)
        torch.testing.assert_close(stored.teacher.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stored.teacher.rotated.embedding, expected.rotated.embedding, rtol=1e-4, atol=1e-5)


def test_images_that_cannot_be_rotated_and_teachers_without_logits_of_rotations_are_refused(small_data, tmp_path):
    def connect_to(recipe, images):
        connect(recipe, terms_of(recipe), images, Accelerator(), [])

    recipe = make_recipe(data_dir=str(small_data), criterion=("sskd",))
    images = load_images(recipe.data, 0, log=lambda _: None)
    with pytest.raises(ValueError, match=r"'sskd' rotates images .* these are 32x48.*--img-size 32"):
        connect_to(recipe, replace(images, input_size=(3, 32, 48)))
    soft = copy.copy(images.train)
    soft.labels = torch.eye(10)[images.train.labels]
    with pytest.raises(ValueError, match=r"'sskd' asks .* the labels are distributions over 10 classes"):
        connect_to(recipe, replace(images, train=soft))
    with pytest.raises(ValueError, match="sskd reads its logits"):  # views stand in for those of images alone
        networks_of(load_model("embedded"), small_data, criterion=("sskd",), teacher_classes="none")
    two = make_recipe(teacher=["embedded"] * 2, data_dir=str(small_data), criterion=("sskd",))
    with pytest.raises(ValueError, match="sskd is fitted on one teacher"):
        connect(two, terms_of(two), images, Accelerator(), [load_model("embedded") for _ in range(2)])


def test_one_of_several_teachers_may_be_silent(small_data):
    recipe = make_recipe(teacher=["embedded"] * 2, teacher_classes=["none", "auto"], data_dir=str(small_data))
    images = load_images(recipe.data, 0, log=lambda _: None)
    teachers = load_teachers(recipe, ())
    adapt_teachers_to_data(teachers, recipe, images)
    networks = finished(recipe, images, teachers)
    assert [teacher.has_logits for teacher in networks.teachers] == [False, True]


def test_whether_a_teacher_shows_its_logits_is_part_of_what_a_run_is(small_data):
    one, two = (
        networks_of(load_model("embedded"), small_data, teacher_classes=word).fingerprint for word in (None, "none")
    )
    assert one != two


def test_a_size_that_no_teacher_takes_and_a_probe_of_two_classifiers_are_refused(small_data):
    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=1)
    with pytest.raises(ValueError, match="fixed to 224 pixels, at which it sees the images"):
        networks_of(fixed, small_data, teacher_img_size=64)
    double = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, depth=1)
    with pytest.raises(ValueError, match="choose 'finetune'"):
        networks_of(double, small_data, fit_teacher_head="probe")


def test_a_store_of_a_fitted_teachers_outputs_is_read_again(small_data, tmp_path, capsys):
    options = {
        "fit_teacher_head": "probe",
        "fitting_epochs": 1,
        "teacher_store": str(tmp_path / "store"),
        "method": "none",
    }
    for name in ("one", "two"):
        mgd_timm.distill(mute_teacher(), data=str(small_data), output=tmp_path / name, **SHORT, **options)
    assert "nothing to write" in capsys.readouterr().out


def test_a_good_teacher_of_two_classes_is_not_near_chance():
    assert [near_chance(*pair) for pair in ((92.0, 2), (55.0, 2), (19.9, 10), (20.1, 10))] == [False, True, True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": ("a", "b"), "teacher_weights": (1.0,)}, "a positive number for each"),
        ({"teacher": ("a",), "teacher_weights": (1.0,)}, "it is for several teachers, and there is one"),
        ({"teacher_classes": "none", "fit_teacher_head": "probe"}, "the fitted classifier would not be used"),
        ({"teacher": ("a", "b"), "teacher_store": "s"}, "it is for one teacher, and there are 2"),
        (
            {"teacher": ("a", "b", "c"), "teacher_classes": ("auto", "f")},
            "2 values for 3 teachers \\('a', 'b', 'c'\\): give --teacher-classes once for all",
        ),
        (
            {"teacher": ("a",), "teacher_classes": ("auto", "f")},
            "2 values for 1 teacher \\('a'\\): give --teacher-classes once for all, or once for each",
        ),
        (
            {"teacher": ("a", "b"), "teacher_classes": ("auto", "none"), "fit_teacher_head": "probe"},
            "would not be used",
        ),
        ({"teacher": None, "fit_teacher_head": "probe"}, "there is no teacher"),
        ({"teacher": ()}, "name one with --teacher, or train without one"),
        ({"teacher_img_size": 0}, "teacher_img_size=0: expected 1 or more"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(ValueError, match=said):
        make_recipe(**options)
