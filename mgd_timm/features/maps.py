"""Choose maps of a network."""

from collections.abc import Sequence

from torch import Tensor


def map_sizes(maps: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Return (channels, height, width) of maps [batch, channels, height, width]."""
    return tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps)


def choose_maps(sizes: Sequence[tuple[int, int, int]], maps: str) -> tuple[int, ...]:
    """Return the indices of the maps that a word such as "stages" selects.

    Args:
        sizes: (channels, height, width) of every map of the model, shallow to deep.
        maps: "last"; "all"; "mid": all but the first, which is the stem's in cifar_* networks (RepDistiller's choice);
            "stages": the deepest map of each of the last four resolutions (or fewer), or four evenly spaced maps where
            the resolution never changes (ViT, mixers); or a number N of evenly spaced maps that end in the last one.

    Raises:
        ValueError: An unknown word, or more maps than the model has.
    """
    count = len(sizes)
    if maps == "last":
        return (count - 1,)
    if maps == "all" or (maps == "mid" and count > 1):
        return tuple(range(maps == "mid", count))
    if maps == "stages":
        deepest = [i for i in range(count) if i + 1 == count or sizes[i + 1][1:] != sizes[i][1:]]
        if len(deepest) > 1:
            return tuple(deepest[-4:])
        maps = str(min(4, count))
    if not maps.isdecimal() or not 1 <= int(maps) <= count:
        raise ValueError(
            f"maps={maps!r}: expected 'stages', 'last', 'mid', 'all' or a number from 1 to {count}, the model's "
            "number of maps."
        )
    return tuple((i + 1) * count // int(maps) - 1 for i in range(int(maps)))


def resolve_indices(name: str, indices: Sequence[int], count: int) -> tuple[int, ...]:
    """Return indices from 0 to `count` - 1; negative ones count from the end. `name` is the network's, for messages.

    Raises:
        ValueError: Indices are out of range, repeated, or not in ascending order.
    """
    resolved = tuple(i + count if i < 0 else i for i in indices)
    if any(not 0 <= i < count for i in resolved) or list(resolved) != sorted(set(resolved)):
        raise ValueError(
            f"indices={tuple(indices)}: {name} has {count} maps; give distinct indices from 0 to {count - 1} in "
            "ascending order."
        )
    return resolved
