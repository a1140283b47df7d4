"""What a model's bits cost: perplexity, bits per byte, divergence from a reference."""
