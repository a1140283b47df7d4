"""Executors of described decoders, and generation on top of them."""
