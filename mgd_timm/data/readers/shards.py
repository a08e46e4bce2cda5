"""Check that no numbered file of a split is missing."""

import re
from collections.abc import Sequence
from pathlib import Path

from mgd_timm.data.decode import DataError

_NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+).*", re.DOTALL)


def check_shards(paths: Sequence[Path]) -> None:
    """Check that files named PART-00000-of-00003 are all there.

    Raises:
        DataError: One is missing, or there are two sets of files of one name.
    """
    found: dict[tuple[Path, str, str, str], set[int]] = {}
    for path in paths:
        match = _NUMBERED.fullmatch(path.name)
        if match:
            found.setdefault((path.parent, match[1], match[3], path.suffix), set()).add(int(match[2]))
    seen: dict[tuple[Path, str, str], str] = {
        (path.parent, path.stem, path.suffix): path.name for path in paths if not _NUMBERED.fullmatch(path.name)
    }
    for (folder, stem, total, ending), numbers in found.items():
        first = 1 if int(total) in numbers else 0
        missing = sorted(set(range(first, first + int(total))) - numbers)
        if missing:
            name = f"{stem}{missing[0]:0{len(total)}d}-of-{total}{ending}"
            raise DataError(
                f"{folder / name}: missing; {len(missing)} of {int(total)} files are: copy or download them again."
            )
        name = f"{stem}*-of-{total}{ending}"
        other = seen.setdefault((folder, stem.rstrip("._-"), ending), name)
        if other != name:
            raise DataError(
                f"{folder}: {other} and {name} are two sets of files of one split: move one of them out of the folder."
            )
