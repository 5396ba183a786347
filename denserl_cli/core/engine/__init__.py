"""One model in training, in plain torch or under DeepSpeed; frozen models beside it."""
