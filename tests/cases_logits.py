"""Reference loops of the criteria that compare logits, or classify with the teacher."""

from cases import Case

CASES: dict[str, Case] = {}
