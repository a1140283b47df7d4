"""Checkpoints: safetensors in and out, memory-mapped, plain and kbit."""
