"""What a machine has, and what is missing for which recipe."""
