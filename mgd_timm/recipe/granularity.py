"""The levels of detail at which heads analyse a teacher (arXiv 2108.06681)."""

from dataclasses import dataclass
from typing import Literal, get_args

Divergence = Literal["forward", "reverse", "balanced", "bdd"]
"""Directions of the divergence of two distributions; `criteria.kd.soft_divergence` has the formulas."""


def check_divergence(divergence: str, reverse_weight: float, reverse_temperature: float | None = None) -> None:
    """Raise ValueError for an unknown divergence, or for values of bdd that are out of range or have no effect.

    Args:
        divergence: As `Divergence`.
        reverse_weight: Weight of bdd's reverse divergence.
        reverse_temperature: Its temperature; None for that of the forward one.
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence={divergence!r}: expected {', '.join(get_args(Divergence))}.")
    if not 0 <= reverse_weight < float("inf"):
        raise ValueError(f"reverse_weight={reverse_weight}: expected a finite number, 0 or more.")
    if reverse_temperature is not None:
        check_temperature(reverse_temperature)
    given = {"reverse_weight": reverse_weight != 1, "reverse_temperature": reverse_temperature is not None}
    unused = [name for name, is_given in given.items() if is_given and divergence != "bdd"]
    if unused:
        raise ValueError(
            f"{unused[0]} with divergence={divergence!r}: it is for divergence=bdd only. Leave it out, or choose bdd."
        )


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
        divergence: Of the code loss; forward in the paper. bdd's reverse divergence has the same temperature.
        reverse_weight: Weight of bdd's reverse divergence.

    Raises:
        ValueError: A value out of range.
    """

    name: str
    dim: int
    temperature: float
    weight: float = 1.0
    divergence: Divergence = "forward"
    reverse_weight: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_divergence(self.divergence, self.reverse_weight, None)
        if self.dim < 1:
            raise ValueError(f"granularity {self.name!r}: dim={self.dim}, expected 1 or more.")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"granularity {self.name!r}: weight={self.weight}, expected a finite number, 0 or more.")


DEFAULT_GRANULARITIES = (Granularity("abstract", 64, 2.0), Granularity("detailed", 256, 8.0))
