"""Find with a probe image the function from a timm model's embedding to its logits.

timm's contract gives the embedding, `forward_head(final, pre_logits=True)`, and the logits, `forward_head(final)`, but
not the function from one to the other. FeatureTap needs it, so that both come from a single call of the head: with the
same dropout mask, and with BatchNorm statistics that count the batch once. timm's models do one of five things, and
each is a function here:

    apply_classifier         vit_tiny_patch16_224    logits = head(embedding)
    apply_conv_classifier    resnetv2_18             logits = a 1x1 convolution of the embedding as a 1x1 map
    average_classifiers      levit_128s              logits = (head(embedding) + head_dist(embedding)) / 2
    call_head_again          crossvit_tiny_240       embedding = two vectors side by side, logits = the mean of a
                                                     classifier on each
    give_no_logits           any with num_classes=0  no logits

In these functions `final` is what `forward_features` returns: a tensor, or a list of them (crossvit, efficientvim).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mgd_timm.features.maps import map_sizes

Classify = Callable[[nn.Module, Any, Tensor], Tensor]
"""Logits [batch, classes] from the model, what `forward_features` returns, and the embedding [batch, dim]."""

Embed = Callable[[nn.Module, Any], Tensor]
"""Embedding [batch, dim] from the model and what `forward_features` returns."""


def apply_classifier(model: nn.Module, final: Any, embedding: Tensor) -> Tensor:  # noqa: ARG001
    """Call the classifier with the embedding."""
    return cast(Any, model).get_classifier()(embedding)


def apply_conv_classifier(model: nn.Module, final: Any, embedding: Tensor) -> Tensor:  # noqa: ARG001
    """Call a classifier that is a 1x1 convolution with the embedding as a map of one position."""
    return cast(Any, model).get_classifier()(embedding[..., None, None]).flatten(1)


def average_classifiers(model: nn.Module, final: Any, embedding: Tensor) -> Tensor:  # noqa: ARG001
    """Average several classifiers of the same embedding, as in models with a distillation head."""
    logits = [classifier(embedding) for classifier in cast(Any, model).get_classifier()]
    return torch.stack(logits).mean(0)


def call_head_again(model: nn.Module, final: Any, embedding: Tensor) -> Tensor:  # noqa: ARG001
    """Call the head a second time: the logits depend on more than the embedding and the classifier."""
    return cast(Any, model).forward_head(final)


def give_no_logits(model: nn.Module, final: Any, embedding: Tensor) -> Tensor:  # noqa: ARG001
    """Return logits without columns, for a model without a classifier."""
    return embedding.new_empty(embedding.shape[0], 0)


# The first that fits is taken. A second call of the head fits every model, and is the last resort.
_CANDIDATES: tuple[Classify, ...] = (apply_classifier, apply_conv_classifier, average_classifiers)


def embed_with_head(model: nn.Module, final: Any) -> Tensor:
    """Return what the head computes before its classifier."""
    return cast(Any, model).forward_head(final, pre_logits=True)


def average_positions(model: nn.Module, final: Any) -> Tensor:
    """Return the mean over positions, for timm's encoders (*_enc), which have no head.

    `final` is [batch, positions, channels], [batch, height, width, channels] or [batch, channels, height, width].
    """
    channels_last = final.shape[-1] == cast(Any, model).num_features
    return final.flatten(1, -2).mean(1) if channels_last else final.flatten(2).mean(2)


@dataclass(frozen=True)
class Probe:
    """Results of a forward pass of the probe image.

    Args:
        num_classes: Width of the logits; 0 without a classifier.
        embed_dim: Width of the embedding.
        classify: The function from the embedding to the logits.
        map_sizes: (channels, height, width) of every map.
        logits: Logits of the probe image; None without a classifier.
        final: The output of `forward_features`.
    """

    num_classes: int
    embed_dim: int
    classify: Classify
    map_sizes: tuple[tuple[int, int, int], ...]
    logits: Tensor | None
    final: Any


def probe_model(
    model: nn.Module, name: str, input_size: tuple[int, ...], embed: Embed, map_options: dict[str, Any]
) -> Probe:
    """Run the model on a probe image and find the function from its embedding to its logits.

    Args:
        model: A timm model; unchanged afterwards.
        name: Its name, for messages.
        input_size: (channels, height, width) of the probe image.
        embed: The function from the output of `forward_features` to the embedding.
        map_options: Arguments of `forward_intermediates`.

    Raises:
        ValueError: The model does not take such an image, its embedding or logits are not one vector per image, or none
            of this module's functions gives its logits.
    """
    timm_model = cast(Any, model)
    with eval_without_gradients(model):
        images = probe_image(model, input_size)
        try:
            logits = timm_model(images) if timm_model.num_classes else None
            final, maps = timm_model.forward_intermediates(images, **map_options)
            embedding = embed(model, final)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{name} cannot be probed with an image of {tuple(input_size)}: {reason}. Give "
                "input_size=(channels, height, width) that the model accepts."
            ) from error
        for what, value in (("logits [batch, classes]", logits), ("an embedding [batch, dim]", embedding)):
            if value is not None and not (isinstance(value, Tensor) and value.ndim == 2):
                given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(f"{name} returns {given}, not {what}: use a global_pool that pools.")
        classify = give_no_logits if logits is None else _find_classify(model, name, logits, final)
    num_classes = 0 if logits is None else logits.shape[1]
    return Probe(num_classes, embedding.shape[1], classify, map_sizes(maps), logits, final)


def _find_classify(model: nn.Module, name: str, expected: Tensor, final: Any) -> Classify:
    """Return the first candidate that gives the expected logits from the same parameters as the head.

    Equal logits are not enough: a new BatchNorm is the identity in eval mode, so that a candidate which skips it gives
    equal logits too.
    """
    from_head, read_by_head = _trace(call_head_again, model, final)

    def equal(logits: Tensor) -> bool:
        if logits.shape != expected.shape:
            return False
        # A model on the meta device has no values: shapes and parameters decide.
        return expected.is_meta or torch.allclose(
            logits.float(), expected.float(), rtol=1e-4, atol=1e-5, equal_nan=True
        )

    for classify in _CANDIDATES:
        try:
            logits, read = _trace(classify, model, final)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError):
            continue  # this classifier cannot be called in this way
        if read == read_by_head and equal(logits):
            return classify
    if equal(from_head):
        _check_head_can_be_called_twice(model, name, final)
        return call_head_again
    raise ValueError(
        f"{name}'s logits are not those of its forward_head: model(x) does something else as well, which "
        "FeatureTap does not support. Choose another model."
    )


def _trace(classify: Classify, model: nn.Module, final: Any) -> tuple[Tensor, list[bool]]:
    """Return a candidate's logits, and for every parameter of the model whether they depend on it."""
    parameters = list(model.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            logits = classify(model, final, embed_with_head(model, final))
            gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return logits.detach(), [gradient is not None for gradient in gradients]


def _check_head_can_be_called_twice(model: nn.Module, name: str, final: Any) -> None:
    """Raise ValueError for a head with dropout (its masks would differ) or BatchNorm (a batch would count twice)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    called: list[nn.Module] = []
    handles = [norm.register_forward_hook(lambda module, *_: called.append(module)) for norm in norms]
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    with eval_without_gradients(model, model, *dropouts), torch.random.fork_rng():
        first, second = embed_with_head(model, final), embed_with_head(model, final)
    for handle in handles:
        handle.remove()
    if called or (not first.is_meta and not torch.equal(first, second)):
        raise ValueError(
            f"{name}'s logits need a second call of its head, which has {'BatchNorm' if called else 'dropout'}: set "
            "drop_rate=0 or choose another model."
        )


@contextmanager
def eval_without_gradients(model: nn.Module, *train_modules: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and disable gradients; restore every module's mode at exit.

    Args:
        model: Any module.
        train_modules: Modules of the model to put into train mode, without their children.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for module in train_modules:
            module.training = True
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def probe_image(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Return a batch of two fixed smooth images of (channels, height, width), with the weights' device and dtype."""
    weight = next(model.parameters())
    count = 2 * size[0] * size[1] * size[2]
    ramp = torch.arange(count, device=weight.device, dtype=torch.float32)
    return (ramp * 0.37).sin().reshape(2, *size).to(weight.dtype)
