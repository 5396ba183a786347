"""Language models and scalar reward models: loading, and one forward pass of each."""
