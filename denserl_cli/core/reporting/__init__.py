"""A run in one page: what its folder records, what that says, plots and tables of it."""
