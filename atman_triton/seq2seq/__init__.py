"""Encoder-decoders: their parts, and the engine that suppresses what they read."""
