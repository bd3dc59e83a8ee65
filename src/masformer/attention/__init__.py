"""Attention over spans: tensors in, tensors out. Knows torch, and nothing of transformers or of models."""

from .attend import attend
from .segments import Segments, UnsupportedSpan

__all__ = ["Segments", "UnsupportedSpan", "attend"]
