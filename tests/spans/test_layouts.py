"""Layouts: the exact layers of known models, the placements, and what is refused."""

import inspect
from pathlib import Path

import pytest

from masformer.spans import LAYOUTS, PLACEMENTS, Block, Full, PlanError, Span, SpanPlan, Window, layout

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "layers", "full", "local"),
    [
        ("gpt-neo", 24, list(range(0, 24, 2)), Window(256)),
        ("zebra", 12, [0, 4, 8], Window(513)),
        ("gemma-3", 26, [5, 11, 17, 23], Window(1024)),
        ("gemma-3", 34, [5, 11, 17, 23, 29], Window(1024)),
        ("llama-4", 48, [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47], Block(8192)),
        ("olmo-3", 32, [3, 7, 11, 15, 19, 23, 27, 31], Window(4096)),
        ("olmo-3", 30, [3, 7, 11, 15, 19, 23, 27, 29], Window(4096)),
        ("gpt-oss", 24, list(range(1, 24, 2)), Window(128)),
        ("gpt-oss", 36, list(range(1, 36, 2)), Window(128)),
        ("hymba", 32, [0, 15, 31], Window(1024)),
        ("mimo-v2", 48, [0, 5, 11, 17, 23, 29, 35, 41, 47], Window(129)),
        ("longgen", 32, list(range(10, 22)), Window(1024, sinks=4)),
        ("masformer", 24, [0, 1, 2, 3], Block(1024)),
        ("masformer", 5, [0], Block(1024)),
        ("full", 3, [0, 1, 2], None),
        ("local", 3, [], Block(1024)),
    ],
)
def test_layers_of_known_models(name: str, layers: int, full: list[int], local: Span | None) -> None:
    plan = layout(name, layers)
    assert list(plan) == [Full() if layer in full else local for layer in range(layers)]


@pytest.mark.parametrize(
    ("placement", "chosen"),
    [
        ("bottom", [0, 1, 2, 3]),
        ("top", [20, 21, 22, 23]),
        ("middle", [10, 11, 12, 13]),
        ("interleaved", [3, 9, 15, 21]),
    ],
)
def test_masformer_placements(placement: str, chosen: list[int]) -> None:
    assert layout("masformer", 24, full=4, placement=placement) == SpanPlan.mixed(24, chosen, Block(1024))


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_placement_makes_as_many_layers_full_as_asked(placement: str, layers: int) -> None:
    for full in range(layers + 1):
        assert len(layout("masformer", layers, full=full, placement=placement).full_layers) == full


def test_interleaved_is_the_centred_spacing() -> None:
    for layers in range(1, 60):
        for full in range(1, layers + 1):
            centred = [int((k + 0.5) * layers / full) for k in range(full)]
            assert PLACEMENTS["interleaved"](layers, full) == centred, (layers, full)


def test_masformer_with_chosen_layers() -> None:
    chosen = [0, 7, 8, 17, 18, 20, 21, 23]
    assert layout("masformer", 30, full=chosen, local=Window(128, sinks=4)).full_layers == tuple(chosen)


@pytest.mark.parametrize(
    ("placement", "chosen"),
    [
        (None, [3, 9, 15, 21]),
        ("interleaved", [3, 9, 15, 21]),
        ("first", [0, 1, 2, 3]),
        ("bottom", [0, 1, 2, 3]),
        ("last", [20, 21, 22, 23]),
        ("top", [20, 21, 22, 23]),
    ],
)
def test_transformer_xl_memories(placement: str | None, chosen: list[int]) -> None:
    plan = layout("transformer-xl", 24, placement=placement)
    assert [layer for layer, span in enumerate(plan) if span == Window(2049)] == chosen
    assert plan.spans.count(Window(257)) == 20


def test_transformer_xl_takes_a_list_and_a_short_memory() -> None:
    plan = layout("transformer-xl", 4, full=[2], local=Window(65))
    assert str(plan) == "window:65*2,window:2049,window:65"


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "full"])
def test_local_replaces_the_local_span_alone(name: str) -> None:
    given = layout(name, 24, local=Block(7, lookback=1))
    default = layout(name, 24)
    changed = [layer for layer in range(24) if given[layer] != default[layer]]
    assert changed == [layer for layer in range(24) if given[layer] == Block(7, lookback=1)] != []


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_makes_a_plan_for_any_number_of_layers(name: str) -> None:
    assert [len(layout(name, layers)) for layers in range(1, 70)] == list(range(1, 70))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gemma-4", {}, "unknown layout 'gemma-4': choose one of full, local, masformer"),
        ("gemma-3", {"full": 4}, r"gemma-3 does not take full \(got 4\): its options are local"),
        ("gemma-3", {"full": 0}, "gemma-3 does not take full"),
        ("gpt-neo", {"placement": "top"}, r"gpt-neo does not take placement \(got 'top'\): its options are local"),
        ("full", {"local": Block(4)}, r"full does not take local \(got .*\): its options are none"),
        ("local", {"full": [1]}, "local does not take full"),
        ("masformer", {"placement": "sides"}, "unknown placement 'sides': choose one of bottom, top, middle"),
        ("masformer", {"placement": "first"}, "unknown placement 'first'"),
        ("transformer-xl", {"placement": "middle"}, "unknown placement 'middle' .* first, bottom, last"),
        ("masformer", {"full": 13}, "cannot make 13 of 12 layers full"),
        ("masformer", {"full": -1}, "cannot make -1 of 12 layers full"),
        ("masformer", {"full": True}, "got True"),
        ("masformer", {"full": "4"}, "got '4'"),
        ("masformer", {"full": 2.5}, r"got 2\.5"),
        ("masformer", {"full": [1, 1.5]}, r"whole numbers, got \[1, 1\.5\]"),
        ("masformer", {"full": [True]}, "whole numbers"),
        ("masformer", {"full": [12]}, "full layer 12 is out of range"),
        ("transformer-xl", {"full": [-1]}, "full layer -1 is out of range"),
        ("masformer", {"full": [1, 1]}, "twice"),
        ("masformer", {"full": [1], "placement": "top"}, "'top' cannot be given together with .* \\[1\\]"),
        ("transformer-xl", {"full": [1], "placement": "last"}, "'last' cannot be given together"),
        ("masformer", {"local": Full()}, r"bounded span, Block or Window, got Full\(\)"),
        ("masformer", {"local": "block:4"}, "got 'block:4'"),
    ],
)
def test_what_a_layout_cannot_do_is_named(name: str, options: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        layout(name, 12, **options)


@pytest.mark.parametrize("layers", [0, -1, True, 2.0, "4"])
def test_a_number_of_layers_that_cannot_be_is_named(layers: object) -> None:
    with pytest.raises(PlanError, match=f"at least 1 layer, got {layers!r}"):
        layout("local", layers)  # type: ignore[arg-type]


def test_longgen_saves_the_kv_that_its_abstract_reports() -> None:
    # arXiv 2410.01485: 62 % less KV at 128K tokens; Llama-2-7B has 32 layers.
    held = sum(span.cache_length(131_072) for span in layout("longgen", 32))
    assert round(1 - held / (32 * 131_072), 2) == 0.62


def test_the_table_in_the_guide_is_what_the_code_makes() -> None:
    text = (DOCS / "spans.md").read_text(encoding="utf-8")
    for name, make in LAYOUTS.items():
        options = {option: p.default for option, p in inspect.signature(make).parameters.items() if option != "layers"}
        local = options.get("local")
        chosen = [str(layer) for layer, span in enumerate(layout(name, 24)) if span != local]
        row = f"| {name} | {', '.join(chosen) if len(chosen) < 24 else 'all'} | {local or ''} | {', '.join(options)} |"
        assert row in text, row
