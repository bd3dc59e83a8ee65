import re
from xml.etree import ElementTree

import pytest

from masformer.report.picture import default_length, plan_svg, plan_text, scores_text
from masformer.spans.plan import SpanPlan
from masformer.spans.span import Block, Full, PlanError, Window

MASFORMER = SpanPlan.mixed(30, (0, 7, 8, 17, 18, 20, 21, 23), Window(128, sinks=4))
PLANS = {
    "masformer": MASFORMER,
    "full": SpanPlan.parse("full*24"),
    "local": SpanPlan.parse("block:1024*24"),
    "one layer": SpanPlan.parse("window:1"),
    "alternating": SpanPlan.parse(",".join(["window:128", "full"] * 50)),
    "many kinds": SpanPlan.parse("block:512:lookback=1:sinks=16*7,window:128*5,block:1024,full,window:64,window:32*60"),
}
SVG = "{http://www.w3.org/2000/svg}"


def test_the_whole_picture():
    plan = SpanPlan.parse("full,window:64:sinks=2*3,block:256*2")
    assert plan_text(plan, 60, length=1024).splitlines() == [
        "6 layers: 1 full, 5 local",
        "",
        "  0",
        "  █░░░▒▒",
        "  █ full",
        "  ░ window 64, 2 sinks",
        "  ▒ block 256",
        "",
        "layers  span                            1,024 tokens   pairs",
        "0       full                ████████████████████████  100.0%",
        "1-3     window 64, 2 sinks  ▌·····················▒▒   12.5%",
        "4-5     block 256           ··················▒▒▒▒▒▒   25.1%",
        "",
        "bar: what the last query sees (▌: sinks)",
        "pairs: share of those of full attention",
    ]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("width", [48, 80, 120])
def test_no_line_is_wider_than_asked(name, width):
    assert max(map(len, plan_text(PLANS[name], width).splitlines())) <= width


@pytest.mark.parametrize("name", PLANS)
def test_the_strip_has_one_cell_a_layer_under_its_ruler(name):
    plan = PLANS[name]
    lines = plan_text(plan).splitlines()
    strips = [(lines[i - 1], line) for i, line in enumerate(lines) if re.fullmatch(r"  [█░▒▓]+", line)]
    cells = "".join(strip.strip() for _, strip in strips)
    assert [layer for layer, cell in enumerate(cells) if cell == "█"] == list(plan.full_layers)
    assert len(cells) == len(plan)
    first = 0
    for ruler, strip in strips:
        assert [int(mark) for mark in ruler.split()] == list(range(first, first + len(strip) - 2, 10))
        first += len(strip) - 2


def test_a_bar_is_as_long_as_the_span_reaches():
    rows = plan_text(SpanPlan((Window(1024), Block(512, lookback=1), Full())), 100, length=4096).splitlines()[-6:-3]
    lengths = [len(re.search("[▒█]+", row)[0]) for row in rows]
    assert lengths[0] == lengths[1] == round(lengths[2] / 4)


def test_a_block_is_drawn_whole_at_a_length_where_the_last_query_sees_little_of_it():
    text = plan_text(SpanPlan((Block(8, sinks=4),)), length=10)
    assert re.search("[·▌]+▒+", text)[0].count("▒") == round(0.8 * len(re.search("[·▌]+▒+", text)[0]))


def test_a_length_shorter_than_every_span_is_drawn_full_without_sinks():
    text = plan_text(SpanPlan((Window(128, sinks=4),)), length=1)
    assert "▌·" not in text
    assert "100.0%" in text


@pytest.mark.parametrize("draw", [plan_text, plan_svg])
def test_a_length_below_one_is_refused(draw):
    with pytest.raises(PlanError, match="at least 1, got 0"):
        draw(MASFORMER, length=0)


def test_the_default_length_is_eight_times_the_longest_reach():
    assert default_length(MASFORMER) == 1024
    assert default_length(SpanPlan((Block(1024, lookback=1, sinks=4), Window(8)))) == 16384
    assert default_length(SpanPlan((Full(),))) == 2048


@pytest.mark.parametrize("name", PLANS)
def test_the_svg_has_a_row_a_layer_with_its_number_and_kind(name):
    plan = PLANS[name]
    rows = ElementTree.fromstring(plan_svg(plan)).findall(f"{SVG}g")
    assert [row.find(f"{SVG}text").text for row in rows] == [str(layer) for layer in range(len(plan))]
    kinds = [{rect.get("class") for rect in row.findall(f"{SVG}rect")} for row in rows]
    for span, kind in zip(plan, kinds, strict=True):
        expected = {"track", "local", "sink"} if getattr(span, "sinks", 0) else {"track", "local"}
        assert kind == (expected if span.is_local else {"full"})


def test_local_bars_are_hatched_and_full_bars_are_not():
    svg = plan_svg(MASFORMER)
    assert re.search(r"\.local\{fill:url\(#(mf\w+-h)\)", svg)[1] == re.search(r'<pattern id="([^"]+)"', svg)[1]
    assert re.search(r"\.full\{fill:var\(--full\)\}", svg)


def test_the_svg_bars_follow_the_reach():
    root = ElementTree.fromstring(plan_svg(SpanPlan((Full(), Window(1024))), length=4096))
    widths = {rect.get("class"): float(rect.get("width")) for rect in root.iter(f"{SVG}rect")}
    assert widths["local"] == widths["full"] / 4


def test_the_words_stand_beside_the_first_layer_of_every_run():
    rows = ElementTree.fromstring(plan_svg(MASFORMER)).findall(f"{SVG}g")
    words = {int(row[0].text): row[-1].text for row in rows if row[-1].get("x") == "242"}
    assert words[0] == words[7] == "full"
    assert words[1] == words[9] == "window 128, 4 sinks"
    assert 8 not in words


def test_the_svg_is_named_and_described_for_screen_readers():
    root = ElementTree.fromstring(plan_svg(MASFORMER, "A <plan> & more", length=4096))
    texts = {child.get("id"): child.text for child in root if child.get("id")}
    named = [texts[reference] for reference in root.get("aria-labelledby").split()]
    assert root.get("role") == "img"
    assert named[0] == "A <plan> & more"
    assert "layers 1-6: window 128, 4 sinks" in named[1]
    assert "4,096 tokens" in named[1]


def test_the_svg_is_the_same_every_time_and_shares_no_id_with_another():
    assert plan_svg(MASFORMER) == plan_svg(MASFORMER)
    ids = [set(re.findall(r'\bid="([^"]+)"', plan_svg(plan))) for plan in PLANS.values()]
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_the_svg_asks_for_nothing_outside_itself_and_has_a_dark_mode():
    svg = plan_svg(MASFORMER)
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]
    assert "prefers-color-scheme:dark" in svg


def test_scores_are_drawn_as_parts_of_the_highest_which_are_written_out():
    scores = {"recall": [0.0, 4.0, 0.001, 2.0, -1.0, 3.9, 1.0, 4.0, 0.5, 0.5, 0.5, 0.5], "kl": [0.0] * 12}
    assert scores_text(scores, {"chosen": [1, 7]}).splitlines() == [
        "        0         10",
        "recall  ·█▁▄·█▂█▁▁▁▁",
        "        1: 4, 7: 4, 5: 3.9, 3: 2, 6: 1",
        "kl      ············",
        "        0: 0, 1: 0, 2: 0, 3: 0, 4: 0",
        "chosen  ·█·····█····",
    ]
    assert scores_text({"loss": [-2.0, -1.0]}, {}).splitlines()[1:] == ["loss  ··", "      1: -1, 0: -2"]
