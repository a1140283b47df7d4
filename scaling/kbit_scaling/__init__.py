"""The scaling study: sweep bits against model size, fit the law, plot it, act on it."""
