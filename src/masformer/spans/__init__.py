"""Spans, plans, layouts and their cost. Pure Python, standard library only."""

from .cost import (
    GPT_NEO_1_3B,
    Flops,
    ModelShape,
    PlanCost,
    Savings,
    chunked_prefill_kv_peak,
    cost,
    paper_setting,
    savings,
)
from .layouts import LAYOUTS, PLACEMENTS, layout
from .plan import SpanPlan
from .span import Block, Full, PlanError, Span, Window, parse_span

__all__ = [
    "GPT_NEO_1_3B",
    "LAYOUTS",
    "PLACEMENTS",
    "Block",
    "Flops",
    "Full",
    "ModelShape",
    "PlanCost",
    "PlanError",
    "Savings",
    "Span",
    "SpanPlan",
    "Window",
    "chunked_prefill_kv_peak",
    "cost",
    "layout",
    "paper_setting",
    "parse_span",
    "savings",
]
