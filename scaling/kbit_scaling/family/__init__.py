"""Training a small model family: one tokenizer, one order of data, several sizes and ages."""
