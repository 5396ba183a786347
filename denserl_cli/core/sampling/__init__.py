"""Sampling of responses, by whatever engine the recipe names."""
