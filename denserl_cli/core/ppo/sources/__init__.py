"""Where rewards come from, one function a file: tensors in, a reward of each token out."""
