"""Reference loops of the criteria that compare the samples of a batch or its channels."""

from cases import Case

CASES: dict[str, Case] = {}
