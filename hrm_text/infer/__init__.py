"""Inference: a key-value cache, sampling, and the engine that turns prompts into text."""
