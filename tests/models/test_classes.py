"""A teacher's rows for the data's classes: found by name or file, and cut out of its classifier."""

import json

import pytest
import timm
import torch

from mgd_timm.features import FeatureTap
from mgd_timm.models.classes import find_teacher_rows, read_class_names, select_classes, select_rows

SYNSETS = ["n01440764", "n02102040", "n02979186"]  # tench, English springer, cassette player
ROWS = [0, 217, 482]


def network(name: str = "test_resnet", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


@pytest.mark.parametrize(
    "names",
    [
        SYNSETS,
        ["tench", "English springer", "cassette player"],
        ["Tinca_tinca", "english-springer spaniel", "Cassette Player"],
    ],
    ids=["synsets", "lemmas", "spelled otherwise"],
)
def test_auto_finds_imagenet_classes_by_synset_and_by_any_of_their_names(names):
    assert find_teacher_rows("auto", network(), names) == ROWS


def test_auto_reads_the_label_names_of_the_weights():
    model = network(num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["cat", "dog", "bird"]}
    assert read_class_names(model) == [("cat",), ("dog",), ("bird",)]
    assert find_teacher_rows("auto", model, ["bird", "cat"]) == [2, 0]


def test_a_name_of_several_classes_and_an_unknown_one_are_refused_with_the_ways_out():
    with pytest.raises(ValueError, match=r"several classes named 'crane' \(rows 134, 517\).*--fit") as caught:
        find_teacher_rows("auto", network(), ["tench", "crane", "no such animal"])
    assert "does not know 'no such animal'" in str(caught.value)
    with pytest.raises(ValueError, match="'Tinca tinca' and 'tench' are the same class of the teacher"):
        find_teacher_rows("auto", network(), ["tench", "Tinca tinca"])
    with pytest.raises(ValueError, match="the names of the teacher's 7 classes are not known"):
        find_teacher_rows("auto", network(num_classes=7), ["a", "b"])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("rows.txt", "0\n217\n482\n"),
        ("windows.txt", "\ufefftench\r\nn02102040\r\ncassette player\r\n"),
        ("names.txt", "tench\nn02102040\ncassette player\n\n"),
        ("list.json", "[0, 217, 482]"),
        ("mapping.json", '{"c": 482, "a": "tench", "b": "217", "unused": 5}'),
        ("mapping.yaml", "a: tench\nb: English springer\nc: 482\n"),
    ],
)
def test_a_file_names_or_counts_the_teachers_classes(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert find_teacher_rows(str(tmp_path / file), network(), ["a", "b", "c"]) == ROWS


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("short.txt", "0\n1\n", "2 classes, the data has 3"),
        ("beyond.txt", "0\n1\n1000\n", "does not know 1000"),
        ("missing.json", '{"a": 1}', "the data's classes b, c are missing"),
        ("broken.json", "[0, 1", "cannot be read"),
        ("kinds.json", "[0, 1.5, true]", "expected a text file"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_teacher_rows(str(tmp_path / file), network(), ["a", "b", "c"])
    with pytest.raises(ValueError, match="no such file"):
        find_teacher_rows(str(tmp_path / "none.txt"), network(), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 64),
        ("test_vit", 64),
        ("deit_tiny_distilled_patch16_224", 224),
        ("efficientvit_m0", 224),
        ("vgg11", 32),
    ],
    ids=["linear", "token", "two classifiers", "normed linear", "wide embedding"],
)
def test_the_kept_rows_give_the_same_logits(name, size):
    options = {"mlp_ratio": 1 / 64} if name == "vgg11" else {}
    model = network(name, **options)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(images)
        select_rows(model, [5, 0, 999], ["x", "y", "z"])
        torch.testing.assert_close(model(images), whole[:, [5, 0, 999]])
    assert model.num_classes == 3
    assert model.pretrained_cfg["label_names"] == ("x", "y", "z")
    tap = FeatureTap(model, input_size=(3, size, size))
    assert tap.num_classes == 3
    torch.testing.assert_close(tap.eval()(images).logits, whole[:, [5, 0, 999]], rtol=1e-4, atol=1e-5)


def test_a_teacher_of_the_same_classes_is_left_alone_and_one_of_another_order_is_put_in_order():
    model = network(num_classes=3)
    before = model.get_classifier().weight.clone()
    select_classes(model, "auto", ["a", "b", "c"])  # it has three nameless classes: the data's
    assert torch.equal(model.get_classifier().weight, before)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["b", "c", "a"]}
    select_classes(model, "auto", ["a", "b", "c"])
    assert torch.equal(model.get_classifier().weight, before[[2, 0, 1]])
    assert json.dumps(model.pretrained_cfg["label_names"]) == '["a", "b", "c"]'


def test_imagenets_classes_by_all_their_names_together_as_data_sets_of_the_hub_have_them():
    names = ["maillot, tank suit", "maillot", "tench, Tinca tinca"]
    assert find_teacher_rows("auto", network(), names) == [639, 638, 0]


def test_auto_orders_as_many_nameless_classes_where_imagenets_names_say_how():
    model = network()
    known = read_class_names(model)
    names = [", ".join(lemmas) for _, *lemmas in known]
    labels = [name if names.count(name) == 1 else known[row][0] for row, name in enumerate(names)]
    before = model.get_classifier().weight.clone()
    select_classes(model, "auto", sorted(labels))  # as folders stand in their order
    assert torch.equal(model.get_classifier().weight, before[[labels.index(name) for name in sorted(labels)]])
    other = network()
    select_classes(other, "auto", [f"kind {i}" for i in range(1000)])
    assert torch.equal(other.get_classifier().weight, before)


def test_a_file_puts_as_many_nameless_classes_in_order(tmp_path):
    (tmp_path / "order.txt").write_text("# the data's order\n2\n0\n1\n")
    model = network(num_classes=3)
    before = model.get_classifier().weight.clone()
    select_classes(model, str(tmp_path / "order.txt"), ["a", "b", "c"])
    assert torch.equal(model.get_classifier().weight, before[[2, 0, 1]])
    select_classes(model, str(tmp_path / "order.txt"), ["a", "b", "c"])  # and not once more
    assert torch.equal(model.get_classifier().weight, before[[2, 0, 1]])
