"""The levels of detail at which heads analyse a teacher (arXiv 2108.06681)."""

from dataclasses import dataclass


def check_temperature(temperature: float) -> float:
    """Return the temperature. Raise ValueError unless it is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a positive, finite number.")
    return temperature


@dataclass(frozen=True)
class Granularity:
    """One level of detail.

    Args:
        name: Name in codes, views and logs.
        dim: Width of the code, 1 or more.
        temperature: T > 0, of the head's fitting and of the code loss.
        weight: Of the code loss in the student's objective, 0 or more; 1 in the paper.

    Raises:
        ValueError: A value out of range.
    """

    name: str
    dim: int
    temperature: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.dim < 1:
            raise ValueError(f"granularity {self.name!r}: dim={self.dim}, expected 1 or more.")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"granularity {self.name!r}: weight={self.weight}, expected a finite number, 0 or more.")


DEFAULT_GRANULARITIES = (Granularity("abstract", 64, 2.0), Granularity("detailed", 256, 8.0))
