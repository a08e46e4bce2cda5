"""What a type checker says of a user's code: `mypy --strict` accepts this file where it reads mgd_timm's types.

Each ignored line holds a deliberate error; an ignore that nothing needs is an error as well.
"""

import mgd_timm
from mgd_timm.features import Batch
from mgd_timm.recipe.recipe import make_recipe

recipe = mgd_timm.Recipe(student="resnet10t")
name: str = recipe.student
epochs: int = mgd_timm.Optim(epochs=5).epochs
fields: tuple[str, ...] = mgd_timm.Batch._fields

mgd_timm.Recipe(student=3)  # type: ignore[arg-type]
mgd_timm.Recipe(studnet="resnet10t")  # type: ignore[call-arg]
wrong: int = make_recipe(student="resnet10t").student  # type: ignore[assignment]
print(Batch.labels_of)  # type: ignore[attr-defined]
