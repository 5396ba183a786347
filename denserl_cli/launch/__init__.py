"""Starting a stage in one or several processes, on one or several machines."""
