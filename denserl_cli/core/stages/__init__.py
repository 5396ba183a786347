"""The stages of a recipe, each from a resolved recipe to its results."""
