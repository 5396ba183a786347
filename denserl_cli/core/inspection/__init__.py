"""Where responses are cut and what their segments earn, to be looked at."""
