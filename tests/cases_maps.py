"""Reference loops of the criteria that compare maps."""

from cases import Case

CASES: dict[str, Case] = {}
