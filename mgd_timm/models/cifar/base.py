"""Base class of the cifar_* networks: timm's methods around a stem, stages whose outputs are the maps, and a linear
classifier."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn


def _check_side(x: Tensor, smallest: int, name: str) -> Tensor:
    height, width = x.shape[-2:]
    if height < smallest or width < smallest:
        raise ValueError(
            f"{name} cannot take images of {height}x{width} pixels: its strides halve them, so the smallest side "
            f"is {smallest} (--img-size {smallest}); cifar_* networks are made for 32x32."
        )
    return x


torch.fx.wrap("_check_side")  # kept as a call in traced graphs, so that they take any size


def _take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    return feature_take_indices(count, indices if indices is None or isinstance(indices, int) else list(indices))


def activate(act: nn.Module, x: Tensor, preact: bool) -> tuple[Tensor, Tensor]:
    """Return the activation of x, and the map: the same, or with `preact` x itself, unchanged by the activation."""
    if preact:
        return act(x.clone()), x
    x = act(x)
    return x, x


class Block(nn.Module):
    """A block that ends in an activation."""

    last_act = "act2"

    def forward_preact(self, x: Tensor) -> Tensor:
        """Return the output before the last activation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.last_act)(self.forward_preact(x))

    def forward_with_preact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the output before the last activation."""
        return activate(getattr(self, self.last_act), self.forward_preact(x), preact=True)


class CifarNet(nn.Module):
    """A network for small images. Map 0 is the stem's, map i is that of stage i; a tail may follow the last stage.

    A subclass builds its modules, then calls `_complete`. It overrides the methods or names in which it differs from
    the plain case: `conv1`, `bn1`, `act1`, then sequences of `Block`.

    Args:
        num_classes: 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: "avg", or "" for an unpooled head without a classifier.
        drop_rate: Dropout before the classifier, in [0, 1).
    """

    classifier_name: ClassVar[str] = "fc"
    stages: ClassVar[tuple[tuple[str, ...], ...]] = (("layer1",), ("layer2",), ("layer3",))  # modules of every stage
    map_modules: ClassVar[tuple[str, ...]] = ("act1", "layer1", "layer2", "layer3")  # the module that gives each map
    tail: ClassVar[tuple[str, ...]] = ()  # modules between the last map and the pooling
    feature_cfg: ClassVar[dict[str, Any]] = {}  # arguments of timm's features_only
    feature_info: list[dict[str, Any]]
    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module

    def __init__(
        self, num_classes: int = 100, in_chans: int = 3, global_pool: Literal["avg", ""] = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.grad_checkpointing = False

    def _complete(self, channels: Sequence[int], reductions: Sequence[int], width: int = 0) -> None:
        """Set feature_info and add the classifier; `width` is the embedding's where a tail changes it."""
        self.feature_info = [
            {"num_chs": number, "reduction": reduction, "module": module}
            for number, reduction, module in zip(channels, reductions, self.map_modules, strict=True)
        ]
        self.num_features = self.head_hidden_size = width or channels[-1]
        self.reset_classifier(self.num_classes, self.global_pool)

    def _init_convs(self) -> None:
        """Normal weights of variance 2 / (kernel area x output channels), no bias: He et al.'s fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _init_classifier(self, linear: nn.Linear) -> None:
        """Keep torch's own initialisation."""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups, for layer-wise learning rates."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1", "blocks": [(blocks, None), *((rf"^{name}\.", (99999,)) for name in self.tail)]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' activations in backward; as in timm's networks, BatchNorm statistics then move twice a
        step."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none."""
        if global_pool is not None:
            if global_pool not in ("avg", "") or (not global_pool and num_classes):
                raise ValueError(f"global_pool={global_pool!r}: expected 'avg', or '' with num_classes=0.")
            self.global_pool = cast(Literal["avg", ""], global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        fresh: nn.Module = nn.Identity()
        if num_classes:
            fresh = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self._init_classifier(fresh)
        setattr(self, self.classifier_name, fresh.train(self.training))

    def _run(self, functions: Iterable[Callable[[Any], Any]], x: Tensor, module: nn.Module | None = None) -> Any:
        """Apply the functions in turn, or the module that consists of them, so that its hooks run."""
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(list(functions), x)
        if module is not None:
            return module(x)
        for function in functions:
            x = function(x)
        return x

    def _stem(self, x: Tensor, preact: bool) -> tuple[Any, Tensor]:
        """Return the input of the first stage, and map 0."""
        return activate(self.act1, self.bn1(self.conv1(x)), preact)

    def _stage(self, index: int, x: Any, preact: bool) -> tuple[Any, Tensor]:
        """Return the input of the next stage (a tensor, or a tuple that begins with one), and map `index`."""
        stages = [cast(nn.Sequential, self.get_submodule(name)) for name in self.stages[index - 1]]
        blocks = [block for stage in stages for block in stage]  # a pruned stage has none
        if preact and blocks:
            return self._run([*blocks[:-1], cast(Block, blocks[-1]).forward_with_preact], x)
        for stage in stages:
            x = self._run(stage, x, module=stage)
        return x, x

    def _tail(self, x: Any) -> Tensor:
        """Return the input of the pooling."""
        return x

    def _walk(self, x: Tensor, take: Sequence[int], last: int, preact: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Run the stages up to `last`.

        Returns:
            What forward_features returns (after fewer stages, the last map), and the maps.
        """
        name = (getattr(self, "pretrained_cfg", None) or {}).get("architecture") or type(self).__name__
        x = _check_side(x, self.feature_info[-1]["reduction"], name)
        carried, stem_map = self._stem(x, preact)
        maps = [stem_map] if 0 in take else []
        for index in range(1, last + 1):
            carried, stage_map = self._stage(index, carried, preact)
            if index in take:
                maps.append(stage_map)
        if last == len(self.stages):
            return self._tail(carried), maps
        return carried if isinstance(carried, Tensor) else carried[0], maps

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Return the input of the pooling: the last map, or the tail's output where there is one."""
        return self._walk(x, (), len(self.stages))[0]

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,  # noqa: ARG002 - timm's contract
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        preact: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return, as timm does, the output of forward_features and the maps of `indices`, the stem's first.

        Args:
            preact: Return the maps as they were before their last activation, which AB reads. The output of
                forward_features is the same.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is supported.")
        take, last = _take_indices(len(self.feature_info), indices)
        final, maps = self._walk(x, take, last if stop_early else len(self.stages), preact)
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop, as timm does, the modules that the maps of `indices` do not need."""
        take, last = _take_indices(len(self.feature_info), indices)
        for names in self.stages[last:]:
            for name in names:
                parent, _, child = name.rpartition(".")
                setattr(self.get_submodule(parent), child, nn.Sequential())
        if prune_norm or last < len(self.stages):
            for name in self.tail:
                setattr(self, name, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_head(self, x: Float[Tensor, "b c h w"], pre_logits: bool = False) -> Float[Tensor, "b ..."]:
        """Return the pooled embedding [batch, dim] with `pre_logits`, otherwise logits [batch, classes]."""
        out: Tensor = x.mean((2, 3)) if self.global_pool else x
        out = nn.functional.dropout(out, self.drop_rate, self.training)
        return out if pre_logits else self.get_classifier()(out)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """Return logits [batch, classes]."""
        return self.forward_head(self.forward_features(x))


def conv_bn(
    in_chs: int, out_chs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Build a convolution without bias, padded so that only its stride changes the size, and its BatchNorm."""
    conv = nn.Conv2d(in_chs, out_chs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_chs)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the groups of channels: (g c) becomes (c g)."""
    batch, channels, height, width = x.shape
    return (
        x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    )


def register(
    kind: type[CifarNet], variants: Mapping[str, Mapping[str, Any]], *, pool: int, first_conv: str = "conv1"
) -> None:
    """Register networks in timm, each as a function in the module of its class.

    Args:
        kind: The class.
        variants: Its arguments, by name of the network.
        pool: Side of the last map of a 32x32 image.
        first_conv: Name of the first convolution.
    """
    cfg = {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (pool, pool),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.5071, 0.4867, 0.4408),  # CIFAR-100's, and so is std
        "std": (0.2675, 0.2565, 0.2761),
        "first_conv": first_conv,
        "classifier": kind.classifier_name,
    }
    module = vars(sys.modules[kind.__module__])
    module["default_cfgs"] = generate_default_cfgs(dict.fromkeys(variants, cfg))  # register_model reads it
    for name, options in variants.items():
        module[name] = register_model(_entry_point(kind, name, options))


def _entry_point(kind: type[CifarNet], name: str, options: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # timm changes this dict, and its own out_indices may reach past feature_info.
        feature_cfg = {"out_indices": tuple(range(len(kind.map_modules))), **kind.feature_cfg}
        return build_model_with_cfg(kind, name, pretrained, feature_cfg=feature_cfg, **options, **kwargs)

    build.__name__, build.__module__ = name, kind.__module__
    return build
