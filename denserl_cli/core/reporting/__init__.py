"""The report of a run, or of several: what the folders record, findings, plots and tables."""
