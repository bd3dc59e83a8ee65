"""Pretrained decoders with mixed spans: the only part that knows transformers."""
