"""One view of any timm model: logits, embedding and chosen maps from a single forward pass.

The feature contract is timm's own (`forward_features`, `forward_intermediates`, `forward_head`), so no layer is named,
no hook is set and there is no per-architecture table. How a model turns its embedding into logits is found by a probe
at construction.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models import get_model_input_config
from torch import Tensor, nn

from mgd_timm.features.contract import Features, Shapes
from mgd_timm.features.maps import choose_maps, resolve_indices

# `final` is what forward_features returns: a tensor, or a list of them (crossvit, efficientvim).
Classify = Callable[[nn.Module, Any, Tensor], Tensor]


def _by_classifier(model: nn.Module, _final: Any, embedding: Tensor) -> Tensor:
    return cast(Any, model).get_classifier()(embedding)


def _by_conv_classifier(model: nn.Module, _final: Any, embedding: Tensor) -> Tensor:
    return cast(Any, model).get_classifier()(embedding[..., None, None]).flatten(1)


def _by_mean_of_classifiers(model: nn.Module, _final: Any, embedding: Tensor) -> Tensor:
    parts = [part(embedding) for part in cast(Any, model).get_classifier()]
    return torch.stack(parts).mean(0)


def _by_second_head_call(model: nn.Module, final: Any, _embedding: Tensor) -> Tensor:
    return cast(Any, model).forward_head(final)


def _by_no_classifier(_model: nn.Module, _final: Any, embedding: Tensor) -> Tensor:
    return embedding.new_empty(embedding.shape[0], 0)


# In this order: a classifier that is put on the embedding sees the same dropout mask and updates BatchNorm statistics
# once.
_WAYS: tuple[Classify, ...] = (_by_classifier, _by_conv_classifier, _by_mean_of_classifiers, _by_second_head_call)


class FeatureTap(nn.Module):
    """Logits, embedding (timm: pre-logits) and maps of a timm model, in one forward pass.

    Without a classifier (num_classes=0) there are logits of no columns. timm's encoders (*_enc), which have no head at
    all, show as embedding the mean over positions of what forward_features gives: what timm itself pools them to with
    global_pool="avg".

    Args:
        model: Any timm model; in the tap it keeps its own `state_dict` under `model.`.
        indices: Which of `forward_intermediates`' maps to return, in ascending order; None for none. Negative counts
            from the end. Or a word for them (`maps.choose_maps`), at `input_size`.
        input_size: (channels, height, width) of the probe image; by default the model's own nominal input size.
        preact: Show the maps as they were before their last activation; cifar_* networks do.
        cam: Show class activation maps too.

    Raises:
        ValueError: The model lacks timm's feature contract, gives an embedding that is not a vector per image, computes
            logits in a way that the probe cannot reproduce, has no map of that index, no maps before an activation, or
            no class activation maps.
    """

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
        self.name = str(getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__)
        # An encoder inherits no get_classifier, and its forward_head only raises.
        self.has_head = hasattr(model, "get_classifier") or getattr(model, "num_classes", None) != 0
        contract = ["forward_features", "forward_intermediates", "num_classes"]
        contract += ["forward_head", "get_classifier"] if self.has_head else ["num_features"]
        lacking = [name for name in contract if not hasattr(model, name)]
        if lacking:
            raise ValueError(
                f"{self.name} has no {', '.join(lacking)}: FeatureTap needs a model built by timm.create_model, not "
                "another module."
            )
        self.input_size = tuple(input_size or get_model_input_config(model)["input_size"])
        self.frozen = self.adapts_batchnorm = False
        self.indices: tuple[int, ...] = ()
        self.cam = cam
        self.map_options: dict[str, Any] = {"output_fmt": "NCHW"}
        if preact:
            if "preact" not in inspect.signature(cast(Any, model).forward_intermediates).parameters:
                raise ValueError(
                    f"{self.name} does not show its maps before their activation, which AB compares: cifar_* networks "
                    "do (mgd-timm list models --filter 'cifar_*')."
                )
            self.map_options["preact"] = True
        maps = self._probe()
        if isinstance(indices, str):
            indices = choose_maps([(m.shape[1], m.shape[2], m.shape[3]) for m in maps], indices)
        if indices is not None:
            self.indices = resolve_indices(self.name, indices, len(maps))

    @contextmanager
    def _probing(self, *modules_in_train: nn.Module) -> Iterator[None]:
        """Eval mode without gradients, every module's mode as it was afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            for module in modules_in_train:
                module.training = True
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _image(self, size: tuple[int, ...], batch: int = 2) -> Tensor:
        """A smooth test picture, the same on every call: no random state is drawn."""
        weight = next(self.model.parameters())
        count = batch * size[0] * size[1] * size[2]
        ramp = torch.arange(count, device=weight.device, dtype=torch.float32)
        return (ramp * 0.37).sin().reshape(batch, *size).to(weight.dtype)

    def _probe(self) -> list[Tensor]:
        """Find how logits follow from the embedding; returns the maps of the probe image."""
        model = cast(Any, self.model)
        with self._probing():
            images = self._image(self.input_size)
            try:
                expected = model(images) if model.num_classes else None
                final, maps = model.forward_intermediates(images, **self.map_options)
                embedding = self._embed(final)
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                reason = str(error) or type(error).__name__
                raise ValueError(
                    f"{self.name} cannot be probed with an image of {tuple(self.input_size)}: {reason}. Give "
                    "input_size=(channels, height, width) that the model accepts."
                ) from error
            if expected is not None and (not isinstance(expected, Tensor) or expected.ndim != 2):
                raise ValueError(
                    f"{self.name} returns {_describe(expected)}, not logits [batch, classes]: set global_pool to one "
                    "that pools."
                )
            if not isinstance(embedding, Tensor) or embedding.ndim != 2:
                raise ValueError(
                    f"{self.name} gives {_describe(embedding)} before its classifier, not an embedding [batch, dim]: "
                    "set global_pool to one that pools."
                )
            self.num_classes, self.embed_dim = (0 if expected is None else expected.shape[1]), embedding.shape[1]
            self._classify: Classify = _by_no_classifier if expected is None else self._find_way(expected, final)
            if self._classify is _by_second_head_call:
                self._refuse_random_head(final)
            if self.cam:
                self._check_cam(expected, final)
        return maps

    def _embed(self, final: Any) -> Tensor:
        """The embedding from what forward_features gives: [b, n, c], [b, h, w, c] or [b, c, h, w] of an encoder without
        a head."""
        model = cast(Any, self.model)
        if self.has_head:
            return cast(Tensor, model.forward_head(final, pre_logits=True))
        last = final.shape[-1] == model.num_features
        return cast(Tensor, final.flatten(1, -2).mean(1) if last else final.flatten(2).mean(2))

    def _class_activation(self, final: Any) -> Tensor | None:
        """The classifier at every position of what forward_features gives; None where that is no map of the embedding's
        width."""
        if (
            not isinstance(final, Tensor)
            or final.ndim != 4
            or self._classify not in (_by_classifier, _by_conv_classifier)
        ):
            return None
        classifier = cast(Any, self.model).get_classifier()
        if final.shape[1] == self.embed_dim:
            final = final.permute(0, 2, 3, 1)
        if final.shape[3] != self.embed_dim:
            return None
        rows = final.flatten(0, 2)
        logits = classifier(rows) if self._classify is _by_classifier else classifier(rows[..., None, None]).flatten(1)
        found: Tensor = logits.unflatten(0, final.shape[:3]).permute(0, 3, 1, 2)
        return found

    def _check_cam(self, expected: Tensor | None, final: Any) -> None:
        if expected is None:
            raise ValueError(
                f"{self.name} has no classifier, so it has no class activation maps (CAT-KD). Choose another network, "
                "or criterion."
            )
        found = self._class_activation(final)
        same = found is not None and (
            found.is_meta or torch.allclose(found.mean((2, 3)), expected, rtol=1e-3, atol=1e-4)
        )
        if not same:
            raise ValueError(
                f"{self.name}'s logits are not the mean over positions of its classifier on the last map: it has no "
                "class activation maps (CAT-KD). Choose a network that pools and then classifies, such as a resnet, "
                "or another criterion."
            )

    def _find_way(self, expected: Tensor, final: Any) -> Classify:
        """The first way that gives the same logits from the same parameters.

        Equal values are not enough: a new BatchNorm is the identity in eval mode, so a classifier that skips it would
            pass.
        """
        _, read = self._traced(_by_second_head_call, final)
        for way in _WAYS:
            try:
                logits, also_read = self._traced(way, final)
            except (RuntimeError, TypeError, NotImplementedError, IndexError):
                continue  # this classifier is called in another way
            if logits.shape != expected.shape or also_read != read:
                continue
            # Without values (a model on meta) shapes and parameters decide.
            if expected.is_meta or torch.allclose(
                logits.float(), expected.float(), rtol=1e-4, atol=1e-5, equal_nan=True
            ):
                return way
        raise ValueError(
            f"{self.name}'s logits do not follow from forward_head: its model(x) does something else as well."
        )

    def _traced(self, way: Classify, final: Any) -> tuple[Tensor, list[bool]]:
        """Logits by one way, and for every parameter of the model whether they depend on it."""
        parameters = list(self.model.parameters())
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                embedding = cast(Any, self.model).forward_head(final, pre_logits=True)
                logits = way(self.model, final, embedding)
                grads = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        return logits.detach(), [grad is not None for grad in grads]

    def _refuse_random_head(self, final: Any) -> None:
        """With two calls of the head, logits and embedding would see different dropout masks or count a batch twice."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        used: list[nn.Module] = []
        handles = [norm.register_forward_hook(lambda module, *_: used.append(module)) for norm in norms]
        dropouts = [m for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        with self._probing(self.model, *dropouts), torch.random.fork_rng():
            head = cast(Any, self.model).forward_head
            one, two = head(final, pre_logits=True), head(final, pre_logits=True)
        for handle in handles:
            handle.remove()
        if used or (not one.is_meta and not torch.equal(one, two)):
            raise ValueError(
                f"{self.name}'s logits need a second call of its head, which has "
                f"{'BatchNorm' if used else 'dropout'}: set drop_rate=0 or choose another model."
            )

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Features of a batch; `maps` are those of `indices`, [batch, channels, height, width]."""
        model = cast(Any, self.model)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.indices:
                final, maps = model.forward_intermediates(images, indices=list(self.indices), **self.map_options)
            else:
                final, maps = model.forward_features(images), ()
            embedding = self._embed(final)
        cam = self._class_activation(final) if self.cam else None
        return Features(self._classify(self.model, final, embedding), embedding, tuple(maps), cam=cam)

    def shapes(self, image_size: int | tuple[int, int]) -> Shapes:
        """Shapes of the features at an image size (pixels: side, or height and width), measured on one forward pass."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        with self._probing():
            features = self(self._image((self.input_size[0], height, width)))
        sizes = tuple((m.shape[1], m.shape[2], m.shape[3]) for m in features.maps)
        cam = (features.cam.shape[2], features.cam.shape[3]) if features.cam is not None else None
        return Shapes(self.num_classes, self.embed_dim, sizes, cam)

    def all_maps(self, image_size: int | tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
        """(channels, height, width) of every map that the model can show at an image size, whatever `indices` chose."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        with self._probing():
            images = self._image((self.input_size[0], height, width))
            _, maps = cast(Any, self.model).forward_intermediates(images, **self.map_options)
        return tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps)

    def freeze_backbone(self, *, adapt_batchnorm: bool = False) -> None:
        """Leave the classifier alone to be trained, and everything else in eval mode without gradients.

        Args:
            adapt_batchnorm: Let the running statistics of the backbone's BatchNorm go on to follow the images; its
                weights stay.

        Raises:
            ValueError: The classifier is no module with weights of its own, or there is no BatchNorm to adapt.
        """
        trained = {id(parameter) for part in self._classifiers() for parameter in part.parameters()}
        if not trained:
            raise ValueError(f"{self.name} has no classifier with weights of its own: it cannot be trained alone.")
        if adapt_batchnorm and not any(_is_batchnorm(module) for module in self.model.modules()):
            raise ValueError(
                f"{self.name} has no BatchNorm whose statistics could follow the images: leave adapt_batchnorm out."
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

    def _classifiers(self) -> list[nn.Module]:
        """The modules that give logits: one, or several that a model averages (deit's distilled ones, crossvit,
        efficientvim)."""
        if not self.num_classes:
            return []
        found = cast(Any, self.model).get_classifier()
        return [
            part for part in (found if isinstance(found, tuple | list) else (found,)) if isinstance(part, nn.Module)
        ]

    # "FeatureTap", not Self, which beartype refuses in a class that it does not decorate as a whole.
    def train(self, mode: bool = True) -> "FeatureTap":
        """As ever, but that a frozen backbone stays in eval mode: its statistics and dropout are those of the trained
        network."""
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
        """The one module that maps the embedding to logits; None where the model has no such module."""
        return cast(Any, self.model).get_classifier() if self._classify is _by_classifier else None


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def show_as_many(maps: str | None, *taps: FeatureTap) -> None:
    """Under "stages" networks of different depths show as many maps: the deepest of those that have more. Other words
    are kept to.

    So any two architectures are paired without a word on their layers: most of timm's have four stages, some two or
    three.
    """
    count = min(len(tap.indices) for tap in taps)
    if maps == "stages" and count:
        for tap in taps:
            tap.indices = tap.indices[-count:]


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"
