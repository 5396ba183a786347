"""Preference pairs and prompts: read, checked, encoded once, cached and batched."""
