"""Linear centred kernel alignment (CKA): how alike two networks' features of the same images are.

Reference: Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited" (ICML 2019),
section 3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def linear_cka(one: Float[Tensor, "n p"], two: Float[Tensor, "n q"]) -> float:
    """Return ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features, from 0 to 1; nan where one of them never changes.

    It does not change if the features are rotated, or scaled as a whole.
    """
    x, y = (features.double() - features.double().mean(0) for features in (one, two))
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(y.T @ x) ** 2 / norms)


def cka_table(ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[list[float]]:
    """Return linear CKA of each of `ones` (rows) with each of `others` (columns)."""
    return [[linear_cka(one, other) for other in others] for one in ones]
