"""Data sets of the Hugging Face hub, read by `datasets`."""

from functools import partial

from mgd_timm.data.decode import DataError
from mgd_timm.data.readers.rows import ReadSplit
from mgd_timm.data.readers.tables import load_tables, read_table
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import unknown

_KNOWN = ("embedded", "uoft-cs/cifar10", "uoft-cs/cifar100", "zalando-datasets/fashion_mnist")


def find_splits(hub_id: str, data: Data) -> dict[str, ReadSplit]:
    """Return the splits of a hub id. The data set is downloaded where it is not in the cache of `datasets`.

    Raises:
        DataError: There is no such data set, or it cannot be read.
    """
    try:
        tables = load_tables(hub_id, data.dataset_config)
    except DataError as error:
        if hub_id in _KNOWN:
            raise
        raise DataError(f"{unknown('data set', hub_id, _KNOWN)} Reading it from the hub failed: {error}") from error
    return {split: partial(read_table, table, split, data) for split, table in tables.items()}
