"""FeatureTap on a model of every timm family, and what it refuses."""

import copy

import pytest
import timm
import torch
from families import ENCODERS, FAMILIES, SLIM
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv5 import MobileNetV5Encoder
from torch import Tensor, nn

from mgd_timm.features import FeatureTap, Shapes, choose_maps, match_number_of_maps
from mgd_timm.features.probe import (
    apply_classifier,
    apply_conv_classifier,
    average_classifiers,
    call_head_again,
    give_no_logits,
)
from mgd_timm.models.checks import check_classifier
from mgd_timm.models.fold_batchnorm import fold_batchnorm


def build(name: str, size: int | None = None, **kwargs) -> nn.Module:
    """A model of 7 classes; on the meta device where no size is given."""
    if size and timm.get_pretrained_cfg(name).fixed_input_size:
        kwargs["img_size"] = size
    torch.manual_seed(0)
    with torch.device("cpu" if size else "meta"):
        return timm.create_model(name, num_classes=7, **kwargs)


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def batches_seen(model: nn.Module) -> list[int]:
    return [int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]


def test_the_table_has_every_family():
    first = {module: timm.list_models(module=module)[0] for module in timm.list_modules()}
    modules = {module for module, name in first.items() if timm.model_entrypoint(name).__module__.startswith("timm.")}
    assert modules == set(FAMILIES), f"missing {modules - set(FAMILIES)}, gone {set(FAMILIES) - modules}"


@pytest.mark.slow
@pytest.mark.parametrize("module", FAMILIES)
def test_family(module):
    name, size = FAMILIES[module]
    model = build(name, size, **SLIM.get(module, {})).train()
    next(model.children()).eval()
    modes = {key: m.training for key, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()

    tap = FeatureTap(model, (0, -1), input_size=(3, size, size))
    shapes, every = tap.shapes(size), tap.all_maps(size)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert {key: m.training for key, m in model.named_modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert shapes.maps == (every[0], every[-1])
    assert (shapes.num_classes, shapes.embed_dim) == (7, tap.embed_dim)
    for word in ("stages", "last"):
        assert choose_maps(every, word)[-1] == len(every) - 1

    x = images(size)
    model.eval()
    with torch.no_grad():
        logits = model(x)
        for indices in ((), tap.indices):  # without maps the way leads over forward_features
            tap.indices = indices
            torch.testing.assert_close(tap(x).logits, logits, rtol=1e-5, atol=1e-6)

    model.train()
    features = tap(x)
    assert features.logits.shape == (2, 7)
    assert features.embedding.shape == (2, tap.embed_dim)
    assert tuple(m.shape[1:] for m in features.maps) == shapes.maps
    assert set(batches_seen(model)) <= {1}
    features.logits.square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []

    model.eval().reset_classifier(0)
    check_without_a_classifier(model, x, shapes)


def check_without_a_classifier(model: nn.Module, x: Tensor, shapes: Shapes) -> None:
    """The embedding is what the model itself gives, as wide as it was with a classifier."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    tap = FeatureTap(model, (0, -1), input_size=tuple(x.shape[1:]))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        features, expected = tap(x), model(x)
    assert (tap.num_classes, tap.embed_dim, tap.classifier) == (0, shapes.embed_dim, None)
    assert features.logits.shape == (2, 0)
    torch.testing.assert_close(features.embedding, expected, rtol=1e-5, atol=1e-6)
    assert tuple(m.shape[1:] for m in features.maps) == shapes.maps
    with pytest.raises(ValueError, match="no classifier with weights of its own"):
        tap.freeze_backbone()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "convnext_xxlarge", "levit_512", "shvit_s4"])
def test_a_model_without_values(name):
    """On the meta device shapes and parameters decide."""
    tap = FeatureTap(build(name), (0, -1))
    features = tap(torch.empty(2, *tap.input_size, device="meta"))
    assert features.logits.shape == (2, 7)
    assert features.embedding.shape == (2, tap.embed_dim)
    assert tuple(m.shape[1:] for m in features.maps) == tap.shapes(tap.input_size[1:]).maps


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnetv2_18", "vit_tiny_r_s16_p8_224"]
)
def test_dropout_of_the_head_is_drawn_once(name):
    model = build(name, 32, drop_rate=0.5)
    tap = FeatureTap(model, input_size=(3, 32, 32))
    tap.train()
    features = tap(images(32, batch=8))
    embedding = features.embedding
    assert 0.2 < (embedding == 0).float().mean() < 0.8
    if isinstance(model.get_classifier(), nn.Conv2d):
        embedding = embedding[..., None, None]
    torch.testing.assert_close(features.logits, model.get_classifier()(embedding).flatten(1))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "shvit_s1", "efficientvim_m1"])
def test_dropout_that_would_be_drawn_twice_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*dropout.*drop_rate=0"):
        FeatureTap(build(name, 64, drop_rate=0.5), input_size=(3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["efficientvit_m0", "shvit_s1", "repvit_m1", "levit_128s", "iformer_t", "cpubone_nano", "lowformer_b0"]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_batchnorm_of_the_head_is_not_skipped_when_it_is_new(name, frozen):
    """A new BatchNorm is the fingerprint in eval mode: the probe must not be deceived by it."""
    model = build(name, 32).requires_grad_(not frozen)
    tap = FeatureTap(model, input_size=(3, 32, 32))
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.running_mean, -0.1, 0.1)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        torch.testing.assert_close(tap.eval()(images(32)).logits, model(images(32)))
        for network in (tap.train(), twin):
            torch.manual_seed(0)  # cpubone draws dropout
            network(images(32))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "levit_128s",
        "efficientformerv2_s0",
        "swiftformer_xs",
        "efficientvim_m1_dist",
        "resnetv2_18",
    ],
)
def test_other_classifiers(name):
    model = build(name, 64)
    tap = FeatureTap(model, (-1,), input_size=(3, 64, 64)).eval()
    assert not isinstance(model.get_classifier(), nn.Linear)
    assert tap.classifier is None
    with torch.no_grad():
        torch.testing.assert_close(tap(images(64)).logits, model(images(64)))


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("vit_tiny_patch16_224", 7, apply_classifier),
        ("resnetv2_18", 7, apply_conv_classifier),
        ("levit_128s", 7, average_classifiers),
        ("crossvit_tiny_240", 7, call_head_again),
        ("vit_tiny_patch16_224", 0, give_no_logits),
    ],
)
def test_the_probe_finds_how_the_embedding_becomes_logits(name, num_classes, expected):
    """The examples of the probe's documentation."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=num_classes)
    assert FeatureTap(model)._classify is expected


def test_the_classifier_maps_the_embedding_to_logits():
    tap = FeatureTap(build("test_vit", 32)).eval()
    features = tap(images(32))
    assert tap.classifier is not None
    torch.testing.assert_close(tap.classifier(features.embedding), features.logits)


def test_a_classifier_of_zeros_and_half_precision_are_probed():
    model = build("deit_tiny_distilled_patch16_224", 64)
    for classifier in model.get_classifier():
        nn.init.zeros_(classifier.weight)
    assert FeatureTap(model).embed_dim == 192
    half = build("test_resnet", 32).to(torch.bfloat16)
    assert FeatureTap(half).shapes(32).embed_dim == 96


def test_state_dict_is_the_models_own():
    model = build("test_resnet", 32)
    tap = FeatureTap(model)
    assert [key.removeprefix("model.") for key in tap.state_dict()] == list(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_shows_the_mean_of_its_last_features(name):
    """Independently: timm's own pooling of the same weights, where it has one."""
    side, options = ENCODERS[name]
    if not options:  # it has none: by shapes, on meta
        with torch.device("meta"):
            tap = FeatureTap(timm.create_model(name), (-1,))
        features = tap(torch.empty(2, *tap.input_size, device="meta"))
        assert features.embedding.shape == (2, tap.model.num_features)
    else:
        torch.manual_seed(0)
        model = timm.create_model(name, global_pool="avg", **options).train()
        tap = FeatureTap(model, (-1,), input_size=(3, side, side))
        with torch.no_grad():
            features = tap(images(side))
            torch.testing.assert_close(features.embedding, model(images(side)), rtol=1e-5, atol=1e-6)
        assert model.training
    assert (tap.num_classes, tap.classifier, features.logits.shape) == (0, None, (2, 0))
    shapes = tap.shapes(tap.input_size[1:])
    assert shapes == (0, features.embedding.shape[1], tap.all_maps(tap.input_size[1:])[-1:], None)


def test_an_encoder_whose_features_are_a_map_pools_them():
    """MobileNetV5's fused map: channels first, of another resolution than the stages'."""
    blocks = decode_arch_def([["er_r1_k3_s2_e4_c32"], ["uir_r1_a0_k5_s2_e4_c48"]])
    model = MobileNetV5Encoder(blocks, stem_size=16, msfa_output_resolution=4).eval()
    tap = FeatureTap(model, input_size=(3, 32, 32))
    with torch.no_grad():
        final = model(images(32))
        assert final.shape == (2, 2048, 4, 4)
        torch.testing.assert_close(tap(images(32)).embedding, final.mean((2, 3)))


def test_a_teacher_without_a_classifier_is_folded():
    model = build("test_resnet", 32)
    model.reset_classifier(0)
    tap = FeatureTap(model, (-1,), input_size=(3, 32, 32)).eval()
    fold = fold_batchnorm(tap)
    assert fold is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold.modules())
    with torch.no_grad():
        torch.testing.assert_close(fold(images(32)).embedding, tap(images(32)).embedding, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"cam": True}])
def test_what_needs_a_classifier_is_refused_without_one(options):
    model = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match="test_resnet has no classifier"):
        FeatureTap(model, input_size=(3, 32, 32), **options).freeze_backbone()


def test_a_student_without_a_classifier_is_refused():
    for name in ("test_resnet", "qwen3_vit_88m_enc"):
        with torch.device("meta"):
            student = timm.create_model(name, num_classes=0)
        with pytest.raises(ValueError, match=rf"{name} has no classifier \(num_classes=0\), and only a teacher"):
            check_classifier(student)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m, "forward", lambda x: 2 * m.forward_head(m.forward_features(x))),
            "something else as well",
        ),
        (lambda m: setattr(m, "forward", lambda x: (x, x)), "returns a tuple, not logits"),
        (lambda m: setattr(m, "forward_head", lambda x, pre_logits=False: x), "not logits"),
    ],
)
def test_models_that_are_refused(change, message):
    model = build("test_resnet", 32)
    change(model)
    with pytest.raises(ValueError, match=message):
        FeatureTap(model)


def test_a_plain_module_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no forward_features, .*timm\.create_model"):
        FeatureTap(nn.Linear(3, 3))


def test_a_model_that_does_not_pool_is_refused():
    with pytest.raises(ValueError, match="global_pool"):
        FeatureTap(build("test_vit", 32, global_pool=""))


def test_a_wrong_input_size_is_named():
    with pytest.raises(ValueError, match=r"deit_tiny.*\(3, 64, 64\).*input_size="):
        FeatureTap(build("deit_tiny_patch16_224", 32), input_size=(3, 64, 64))


@pytest.mark.parametrize("indices", [(5,), (-6,), (1, 0), (1, 1), (4, -1)])
def test_bad_indices_are_refused(indices):
    with pytest.raises(ValueError, match="5 maps; give distinct indices from 0 to 4 in ascending order"):
        FeatureTap(build("test_resnet", 32), indices)


def test_indices_count_from_either_end():
    tap = FeatureTap(build("test_resnet", 32), (1, -1))
    assert tap.indices == (1, 4)
    assert FeatureTap(tap.model)(images(32)).maps == ()


def test_maps_by_a_word_are_those_of_the_probed_size():
    assert FeatureTap(build("test_resnet", 32), "stages", input_size=(3, 32, 32)).indices == (1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"maps='some'.*'stages', 'last'"):
        FeatureTap(build("test_resnet", 32), "some", input_size=(3, 32, 32))


def test_shapes_of_rectangles():
    tap = FeatureTap(build("test_resnet", 32), (-1,))
    assert tap.shapes((64, 32)).maps == ((96, 2, 1),)


@pytest.mark.parametrize(
    ("sides", "word", "expected"),
    [
        ([32, 16, 8, 4, 2], "stages", (1, 2, 3, 4)),
        ([32, 32, 16, 8], "stages", (1, 2, 3)),
        ([4] * 12, "stages", (2, 5, 8, 11)),
        ([4] * 3, "stages", (0, 1, 2)),
        ([8, 4, 4, 4], "stages", (0, 3)),
        ([32, 16, 8], "last", (2,)),
        ([32, 16, 8, 4, 4], "mid", (1, 2, 3, 4)),
        ([4] * 12, "3", (3, 7, 11)),
        ([32, 16, 8], "3", (0, 1, 2)),
        ([8], "1", (0,)),
    ],
)
def test_choose_maps(sides, word, expected):
    assert choose_maps([(16, side, side) for side in sides], word) == expected


@pytest.mark.parametrize(("maps", "expected"), [("stages", (3, 4)), ("all", (0, 1, 2, 3, 4)), (None, ())])
def test_only_under_stages_two_taps_show_as_many_maps_as_the_one_with_fewer(maps, expected):
    tap = FeatureTap(build("test_resnet", 32), maps)
    other = FeatureTap(build("test_resnet", 32), (0, 2))
    match_number_of_maps(maps, tap, other)
    assert (tap.indices, other.indices) == (expected, (0, 2))


@pytest.mark.parametrize("word", ["", "0", "4", "-1", "every", "1.5", "²"])
def test_choose_maps_refuses(word):
    with pytest.raises(ValueError, match="'stages', 'last', 'mid', 'all' or a number from 1 to 3"):
        choose_maps([(16, 8, 8)] * 3, word)


def test_running_out_of_memory_is_not_taken_for_a_wrong_input_size(monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = timm.create_model("test_resnet", num_classes=3)
    monkeypatch.setattr(model, "forward_intermediates", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        FeatureTap(model, input_size=(3, 32, 32))
