"""One run, from a recipe to an exported student."""
