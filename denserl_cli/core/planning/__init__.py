"""What a recipe will do and what fits, worked out before anything is loaded."""
