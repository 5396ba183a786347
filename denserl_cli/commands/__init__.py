"""One thin module a command: read the recipe, apply the overrides, launch."""
