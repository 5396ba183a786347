"""A run's folder: its record, checkpoints, logs and trackers."""
