"""A plan drawn: which layer sees how far, for the terminal and as an SVG; and what layers are worth, for the terminal.

Both pictures of a plan show the query at the end of a document: its keys run from the document's first token (left)
to itself (right), a bar covers what it sees, a mark at the left edge the sinks. How far a block sees depends on the
position; the most is drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

from masformer.spans.plan import SpanPlan
from masformer.spans.span import Full, PlanError, Span

SHADES = "░▒▓"  # local spans in the strip, shortest first; further ones share the last
HEIGHTS = "·▁▂▃▄▅▆▇█"  # of a layer's score, 0 or less first
HIGHEST = 5  # layers whose scores are written out


def default_length(plan: SpanPlan) -> int:
    """The document length drawn where none is given: a power of two, about eight times the longest local reach."""
    longest = max((_reach(span, 2**24) for span in plan if span.is_local), default=256)
    return 1 << (8 * longest - 1).bit_length()


def plan_text(plan: SpanPlan, width: int = 80, *, length: int | None = None) -> str:
    """The plan as lines of Unicode text of at most `width` columns (48 at the least), without colour.

    A strip with one cell a layer, then one row for every run of layers with the same span: its bar and its share
    of the (query, key) pairs of full attention.

    Args:
        length: tokens of the document drawn; `default_length(plan)` if None.

    Raises:
        PlanError: a length below 1.
    """
    length = _checked_length(plan, length)
    width = max(48, width)
    rows = [(_layers(run), _words(span), _share(span, length)) for span, run in _runs(plan)]
    left = max(len("layers"), *(len(layers) for layers, _, _ in rows))
    middle = min(max(len("span"), *(len(words) for _, words, _ in rows)), width - left - 24)
    bar = width - left - middle - 12
    lines = [_summary(plan), "", *_strip(plan, width), ""]
    lines.append(f"{'layers':<{left}}  {'span':<{middle}}  {f'{length:,} tokens':>{bar}}  {'pairs':>6}")
    for (layers, words, share), (span, _) in zip(rows, _runs(plan), strict=True):
        lines.append(f"{layers:<{left}}  {_cut(words, middle):<{middle}}  {_bar(span, length, bar)}  {share:>6}")
    lines += ["", "bar: what the last query sees (▌: sinks)", "pairs: share of those of full attention"]
    return "\n".join(lines)


def scores_text(scores: Mapping[str, Sequence[float]], marked: Mapping[str, Sequence[int]]) -> str:
    """What each layer is worth to each method as lines of Unicode text, a column a layer, and which layers are marked.

    Bars are parts of the method's own highest score; the first few are written out below.

    Args:
        scores: at least one, of finite numbers.
    """
    layers = max(map(len, scores.values()))
    left = max(map(len, (*scores, *marked)))
    lines = [" " * (left + 2) + "".join(f"{layer:<10}" for layer in range(0, layers, 10)).rstrip()]
    for name, values in scores.items():
        order = sorted(range(len(values)), key=lambda layer: (-values[layer], layer))[:HIGHEST]
        numbers = ", ".join(f"{layer}: {values[layer]:.3g}" for layer in order)
        lines += [f"{name:<{left}}  {_heights(values)}", " " * (left + 2) + numbers]
    for name, chosen in marked.items():
        lines.append(f"{name:<{left}}  {''.join('█' if layer in chosen else '·' for layer in range(layers))}")
    return "\n".join(lines)


def _heights(values: Sequence[float]) -> str:
    most = max(*values, 0.0) or 1.0
    return "".join(HEIGHTS[math.ceil(max(value, 0.0) / most * (len(HEIGHTS) - 1))] for value in values)


def plan_svg(plan: SpanPlan, title: str | None = None, *, length: int | None = None) -> str:
    """The plan as one self-contained, accessible SVG, a row for every layer; follows the reader's dark mode.

    Full layers are solid, local ones hatched, sinks a block at the left edge; the words beside a run say the same.

    Raises:
        PlanError: a length below 1.
    """
    length = _checked_length(plan, length)
    heading = title or _summary(plan)
    top = TOP if title else TOP - 16
    height = top + ROW * len(plan) + 28
    name = "mf" + hashlib.sha256(f"{plan}|{heading}|{length}".encode()).hexdigest()[:10]
    body = [_svg_row(plan, layer, top + ROW * layer, length, name) for layer in range(len(plan))]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-labelledby="{name}-t {name}-d" class="{name}">',
            f'<title id="{name}-t">{escape(heading)}</title>',
            f'<desc id="{name}-d">{escape(_description(plan, length))}</desc>',
            _svg_style(name),
            f'<rect class="ground" width="{WIDTH}" height="{height}"/>',
            *_svg_heading(plan, title),
            *body,
            *_svg_axis(top + ROW * len(plan), length),
            "</svg>",
        ]
    )


def _checked_length(plan: SpanPlan, length: int | None) -> int:
    if length is not None and length < 1:
        raise PlanError(f"the length of the document must be at least 1, got {length}")
    return length or default_length(plan)


def _reach(span: Span, length: int) -> int:
    """The most keys that any query of a document of `length` tokens sees, sinks apart."""
    if span.is_local:
        span = dataclasses.replace(span, sinks=0)  # type: ignore[type-var]  # every local span has sinks
    return span.peak_cache_length(length - 1) + 1


def _sunk(span: Span, length: int) -> int:
    """How many sinks the last query sees beside its span."""
    return span.visible(length - 1) - (length - span.start(length - 1))


def _share(span: Span, length: int) -> str:
    return f"{100 * span.visible_pairs(length) / Full().visible_pairs(length):.1f}%"


def _runs(plan: SpanPlan) -> list[tuple[Span, list[int]]]:
    groups = itertools.groupby(range(len(plan)), key=lambda layer: plan[layer])
    return [(span, list(layers)) for span, layers in groups]


def _layers(run: Sequence[int]) -> str:
    return f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"


def _words(span: Span) -> str:
    """`window 128, 4 sinks`: the span for people."""
    values = span.to_json()
    parts = [f"{span.kind} {values['size']:,}" if "size" in values else span.kind]
    if values.get("lookback"):
        parts.append(f"lookback {values['lookback']}")
    if values.get("sinks"):
        parts.append(f"{values['sinks']} sinks")
    return ", ".join(parts)


def _summary(plan: SpanPlan) -> str:
    full = len(plan.full_layers)
    return f"{len(plan)} layers: {full} full, {len(plan) - full} local"


def _description(plan: SpanPlan, length: int) -> str:
    rows = [f"layers {_layers(run)}: {_words(span)}" for span, run in _runs(plan)]
    return f"{_summary(plan)}. What the last query of {length:,} tokens sees. " + "; ".join(rows) + "."


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _symbols(plan: SpanPlan) -> dict[Span, str]:
    local = sorted({span for span in plan if span.is_local}, key=lambda span: (_reach(span, 2**24), str(span)))
    marks = {span: SHADES[min(rank, len(SHADES) - 1)] for rank, span in enumerate(local)}
    return {Full(): "█", **marks}


def _strip(plan: SpanPlan, width: int) -> list[str]:
    """One cell a layer under a ruler of tens, in rows of a multiple of ten layers, and what the cells mean."""
    symbols, indent = _symbols(plan), "  "
    rows = math.ceil(len(plan) / ((width - len(indent)) // 10 * 10))
    per_row = math.ceil(len(plan) / rows / 10) * 10
    lines = []
    for first in range(0, len(plan), per_row):
        row = range(first, min(first + per_row, len(plan)))
        lines.append(indent + "".join(f"{layer:<10}" for layer in row if layer % 10 == 0).rstrip())
        lines.append(indent + "".join(symbols[plan[layer]] for layer in row))
    used = [span for span in symbols if span in plan.spans]
    return lines + [indent + _cut(f"{symbols[span]} {_words(span)}", width - len(indent)) for span in used]


def _bar(span: Span, length: int, width: int) -> str:
    if not span.is_local:
        return "█" * width
    cells = min(width, max(1, round(width * _reach(span, length) / length)))
    sinks = "▌" if _sunk(span, length) and cells < width else ""
    return sinks + "·" * (width - cells - len(sinks)) + "▒" * cells


WIDTH, ROW, TOP = 440, 16, 46  # user units of the SVG; a row holds 11-unit bars
LEFT, PLOT, SIDE = 34, 200, 242  # layer numbers end before LEFT; bars are PLOT wide; words start at SIDE

STYLE = """
.NAME{font:12px system-ui,sans-serif;--ground:#fff;--ink:#1b1d22;--faint:#6b7280;--full:#1d5fa8;--local:#b4530a}
@media(prefers-color-scheme:dark){
.NAME{--ground:#16181d;--ink:#e8eaed;--faint:#9aa1ac;--full:#6cb0f5;--local:#f3a25b}}
.NAME text{fill:var(--ink)}
.NAME .head{font-weight:600;font-size:13px}
.NAME .small{font-size:11px;fill:var(--faint)}
.NAME .ground{fill:var(--ground)}
.NAME .track{fill:none;stroke:var(--faint);stroke-opacity:.35}
.NAME .full{fill:var(--full)}
.NAME .local{fill:url(#NAME-h);stroke:var(--local)}
.NAME .sink{fill:var(--local)}
.NAME .hatch{stroke:var(--local);stroke-width:2.4}
"""


def _svg_style(name: str) -> str:
    hatch = (
        f'<pattern id="{name}-h" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line class="hatch" x1="1" y1="0" x2="1" y2="5"/></pattern>'
    )
    return f"<style>{STYLE.replace('NAME', name)}</style>\n<defs>{hatch}</defs>"


def _svg_heading(plan: SpanPlan, title: str | None) -> list[str]:
    if not title:
        return [f'<text class="head" x="8" y="20">{_summary(plan)}</text>']
    return [
        f'<text class="head" x="8" y="20">{escape(_cut(title, 56))}</text>',
        f'<text class="small" x="8" y="36">{_summary(plan)}</text>',
    ]


def _svg_row(plan: SpanPlan, layer: int, y: int, length: int, name: str) -> str:
    span = plan[layer]
    parts = [f'<text class="small" x="{LEFT - 6}" y="{y + 10}" text-anchor="end">{layer}</text>']
    if not span.is_local:
        parts.append(_rect("full", LEFT, y, PLOT))
    else:
        seen = min(float(PLOT), max(5.0, PLOT * _reach(span, length) / length))
        parts += [_rect("track", LEFT, y, PLOT), _rect("local", LEFT + PLOT - seen, y, seen)]
        if _sunk(span, length) and seen < PLOT - 5:
            parts.append(_rect("sink", LEFT, y, max(4.0, PLOT * _sunk(span, length) / length)))
    if layer == 0 or plan[layer - 1] != span:
        parts.append(f'<text x="{SIDE}" y="{y + 10}">{_cut(_words(span), 32)}</text>')
    return "<g>" + "".join(parts) + "</g>"


def _rect(kind: str, x: float, y: float, width: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="11"/>'


def _svg_axis(y: int, length: int) -> list[str]:
    return [
        f'<text class="small" x="{LEFT}" y="{y + 14}">first token</text>',
        f'<text class="small" x="{LEFT + PLOT}" y="{y + 14}" text-anchor="end">token {length:,}</text>',
        f'<text class="small" x="{SIDE}" y="{y + 14}">what its query sees</text>',
    ]
