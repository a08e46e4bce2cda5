"""Logits, embedding and chosen maps of any timm model from a single forward pass.

FeatureTap calls timm's own methods (`forward_features`, `forward_intermediates`, `forward_head`), so no layer is named,
no hook is set and there is no per-architecture table. How a model turns its embedding into logits is found by a probe
at construction (see `probe`).
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models import get_model_input_config
from torch import Tensor, nn

from mgd_timm.features.class_activation import check_class_activation_maps, class_activation_maps
from mgd_timm.features.contract import Features, Shapes
from mgd_timm.features.maps import choose_maps, map_sizes, resolve_indices
from mgd_timm.features.probe import (
    Embed,
    apply_classifier,
    average_positions,
    embed_with_head,
    eval_without_gradients,
    probe_image,
    probe_model,
)


def model_name(model: nn.Module) -> str:
    """Return the architecture of a timm model, or the name of its class."""
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)


class FeatureTap(nn.Module):
    """Logits, embedding (timm: pre-logits) and maps of a timm model, in one forward pass.

    Without a classifier (num_classes=0) the logits have no columns. timm's encoders (*_enc) have no head: their
    embedding is the mean over positions of the output of forward_features, as with timm's global_pool="avg".

    Args:
        model: Any timm model.
        indices: Indices of the maps of `forward_intermediates` to return, in ascending order; negative ones count from
            the end. Or a word that selects maps at `input_size` (`maps.choose_maps`). None for no maps.
        input_size: (channels, height, width) of the probe image; by default the model's nominal input size.
        preact: Return maps before their last activation; only cifar_* networks can.
        cam: Return class activation maps too.

    Raises:
        ValueError: The model lacks timm's methods, its embedding is not one vector per image, its logits are computed
            in an unsupported way, or it has no such map, no maps before their activation or no class activation maps.
    """

    lr_scale: float = 1.0
    """Learning rate of the model's weights where it trains, as a multiple of the optimizer's."""

    def __init__(
        self,
        model: nn.Module,
        indices: Sequence[int] | str | None = None,
        *,
        input_size: tuple[int, int, int] | None = None,
        preact: bool = False,
        cam: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = model_name(model)
        # An encoder inherits no get_classifier, and its forward_head only raises.
        has_head = hasattr(model, "get_classifier") or getattr(model, "num_classes", None) != 0
        _check_is_timm_model(model, self.name, has_head)
        self.input_size = tuple(input_size or get_model_input_config(model)["input_size"])
        self.frozen = self.adapts_batchnorm = False
        self.indices: tuple[int, ...] = ()
        self.cam = cam
        self._map_options: dict[str, Any] = {"output_fmt": "NCHW"}
        if preact:
            _check_takes_preact(model, self.name)
            self._map_options["preact"] = True
        self._embed: Embed = embed_with_head if has_head else average_positions
        probe = probe_model(model, self.name, self.input_size, self._embed, self._map_options)
        self.num_classes, self.embed_dim, self._classify = probe.num_classes, probe.embed_dim, probe.classify
        if cam:
            check_class_activation_maps(model, self.name, probe)
        if isinstance(indices, str):
            indices = choose_maps(probe.map_sizes, indices)
        if indices is not None:
            self.indices = resolve_indices(self.name, indices, len(probe.map_sizes))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Return the features of a batch; `maps` are those of `indices`, [batch, channels, height, width]."""
        model = cast(Any, self.model)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.indices:
                final, maps = model.forward_intermediates(images, indices=list(self.indices), **self._map_options)
            else:
                final, maps = model.forward_features(images), ()
            embedding = self._embed(self.model, final)
        cam = class_activation_maps(self.model, self._classify, final, self.embed_dim) if self.cam else None
        return Features(self._classify(self.model, final, embedding), embedding, tuple(maps), cam=cam)

    def probe(self, image_size: tuple[int, int] | None = None) -> Features:
        """Return the features of a fixed image in eval mode, without gradients.

        Args:
            image_size: (height, width) in pixels; by default those of `input_size`.
        """
        size = (self.input_size[0], *(image_size or self.input_size[1:]))
        with eval_without_gradients(self.model):
            features: Features = self(probe_image(self.model, size))
        return features

    def shapes(self, image_size: int | tuple[int, int]) -> Shapes:
        """Measure the shapes of the features at an image size (pixels: side, or height and width)."""
        features = self.probe(_height_and_width(image_size))
        sizes = map_sizes(features.maps)
        cam = (features.cam.shape[2], features.cam.shape[3]) if features.cam is not None else None
        return Shapes(self.num_classes, self.embed_dim, sizes, cam)

    def all_maps(self, image_size: int | tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
        """Return (channels, height, width) of all maps of the model at an image size, not only those of `indices`."""
        size = (self.input_size[0], *_height_and_width(image_size))
        with eval_without_gradients(self.model):
            images = probe_image(self.model, size)
            _, maps = cast(Any, self.model).forward_intermediates(images, **self._map_options)
        return map_sizes(maps)

    def freeze_backbone(self, *, adapt_batchnorm: bool = False) -> None:
        """Leave only the classifier trainable, and everything else in eval mode without gradients.

        Args:
            adapt_batchnorm: Update the running statistics of the backbone's BatchNorm; its weights stay.

        Raises:
            ValueError: The classifier has no weights, or there is no BatchNorm to adapt.
        """
        trained = {id(parameter) for part in self._classifiers() for parameter in part.parameters()}
        if not trained:
            raise ValueError(f"{self.name} has no classifier with weights of its own: it cannot be trained alone.")
        if adapt_batchnorm and not any(_is_batchnorm(module) for module in self.model.modules()):
            raise ValueError(
                f"{self.name} has no BatchNorm whose statistics could be updated: leave adapt_batchnorm out."
            )
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.frozen, self.adapts_batchnorm = True, adapt_batchnorm
        self.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the model's own `no_weight_decay()` exempts from weight decay."""
        names = cast(Any, self.model).no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in names}

    def thaw(self) -> None:
        """Undo `freeze_backbone`: every parameter takes gradients again."""
        if self.frozen:
            self.frozen = self.adapts_batchnorm = False
            self.model.requires_grad_(True)

    # "FeatureTap", not Self, which beartype refuses in a class that it does not decorate as a whole.
    def train(self, mode: bool = True) -> "FeatureTap":
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen and mode:
            self.model.eval()
            for part in self._classifiers():
                part.train()
            if self.adapts_batchnorm:
                for module in self.model.modules():
                    module.training = module.training or _is_batchnorm(module)
        return self

    @property
    def classifier(self) -> nn.Module | None:
        """The one module that maps the embedding to logits; None if there is no such module."""
        return cast(Any, self.model).get_classifier() if self._classify is apply_classifier else None

    def _classifiers(self) -> list[nn.Module]:
        """Return the modules that give logits: one, or several that a model averages (deit's distilled ones)."""
        if not self.num_classes:
            return []
        found = cast(Any, self.model).get_classifier()
        parts = found if isinstance(found, tuple | list) else (found,)
        return [part for part in parts if isinstance(part, nn.Module)]


def match_number_of_maps(maps: str | None, *taps: FeatureTap) -> None:
    """If `maps` is "stages", keep only the deepest maps of each tap, as many as the tap with the fewest has.

    So any two architectures can be paired without naming layers: most of timm's have four stages, some two or three.
    """
    count = min(len(tap.indices) for tap in taps)
    if maps == "stages" and count:
        for tap in taps:
            tap.indices = tap.indices[-count:]


def _check_is_timm_model(model: nn.Module, name: str, has_head: bool) -> None:
    needed = ["forward_features", "forward_intermediates", "num_classes"]
    needed += ["forward_head", "get_classifier"] if has_head else ["num_features"]
    missing = [attribute for attribute in needed if not hasattr(model, attribute)]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}: FeatureTap needs a model built by timm.create_model.")


def _check_takes_preact(model: nn.Module, name: str) -> None:
    if "preact" not in inspect.signature(cast(Any, model).forward_intermediates).parameters:
        raise ValueError(
            f"{name} cannot return its maps before their activation, which criterion ab compares: use cifar_* networks "
            "(mgd-timm list models --filter 'cifar_*')."
        )


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
