"""Files, locks, processes, signals, versions and the hub."""
