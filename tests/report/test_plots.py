import re
from xml.etree import ElementTree

import pytest

from masformer.report.places import colour, heat_map, ink_on
from masformer.report.plots import COLOURS, bars, layer_bars, lines, loss_by_position, short, trade_off, undominated

matplotlib = pytest.importorskip("matplotlib")

SERIES = {
    "parent": [(16, 3.5), (256, 3.0), (4096, 2.5)],
    "all local": [(16, 3.5), (256, 3.3), (4096, 3.2)],
    "chosen & <8>": [(16, 3.5), (256, 3.1), (4096, 2.6)],
}
GROUPS = {"parent": [1.0, 1.0], "chosen": [0.4, 0.25]}


SCORES = {(0.1, 1024): 1.0, (0.9, 1024): 0.5, (0.1, 4096): 0.0}
LAYERS = [0.5, -0.1, 0.2, 0.0], [(0,), (0, 2)], [(0,), (2, 3)]
POINTS = {"parent": (10.0, 2.0), "chosen": (4.0, 2.1), "all local": (1.0, 3.0), "worse": (5.0, 2.5)}


def draw_both():
    return [loss_by_position(SERIES), bars(["prefill", "decode"], GROUPS, "relative cost")]


def draw_all():
    with_bars = {"a": [(0, 1.0, 0.9, 1.2), (1, 2.0, None, None)]}
    marked = lines(with_bars, "place", "loss", marks={0: "16", 1: "never"}, zero=True)
    return [*draw_both(), marked, heat_map(SCORES), trade_off(POINTS, "cost", "loss"), layer_bars(*LAYERS)]


def texts(svg):
    return {
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
    }


def test_the_words_of_a_plot_stay_text():
    loss, cost = map(texts, draw_both())
    assert {*SERIES, "position in the document (tokens)", "loss (nats/token)", "4,096"} <= loss
    assert {*GROUPS, "prefill", "decode", "relative cost", "0.25"} <= cost


def test_the_same_numbers_give_the_same_bytes_whatever_the_users_settings():
    first = draw_all()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert draw_all() == first
    assert "<metadata" not in "".join(first)


def test_the_settings_of_matplotlib_are_left_as_they_were():
    before = dict(matplotlib.rcParams)
    draw_both()
    assert dict(matplotlib.rcParams) == before


def test_a_failed_plot_also_restores_the_settings():
    before = dict(matplotlib.rcParams)
    with pytest.raises(ValueError):
        loss_by_position({"a": [(1.0, "no number", 3.0)]})
    assert dict(matplotlib.rcParams) == before


def test_series_differ_in_line_and_marker_beside_the_colour():
    svg = loss_by_position({f"s{i}": [(1.0, i), (100.0, i)] for i in range(6)})
    styles = re.findall(r'style="fill: none; (stroke-dasharray[^"]*?); stroke-dashoffset: 0; stroke: (#\w+)', svg)
    assert len(set(styles)) == 5, "five of six lines are dashed, each in its own way"
    assert len({dashes for dashes, _ in styles}) == 5
    assert len({colour for _, colour in styles}) == 5
    assert len(set(re.findall(r'xlink:href="#(\w+)"', svg))) >= 6 + 2  # six markers, ticks of two axes


def test_ink_is_the_pages_own_colour():
    for svg in draw_all():
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "#000000" not in svg
        assert "#fdfcfb" not in svg


def test_two_plots_in_one_page_share_no_id_and_every_reference_is_met():
    ids = []
    for svg in draw_all():
        own = re.findall(r' id="([^"]+)"', svg)
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) == set(own)
        ids += own
    assert len(ids) == len(set(ids))


def test_a_plot_brings_no_style_sheet_and_asks_for_nothing_outside():
    for svg in draw_all():
        assert svg.startswith("<svg")
        assert "<style" not in svg
        assert all("www.w3.org" in address for address in re.findall(r"https?://[^\"]+", svg))


def test_groups_of_bars_differ_in_hatching():
    svg = bars(["a"], {f"g{i}": [1.0] for i in range(6)}, "y")
    assert len(re.findall("<pattern", svg)) == 5
    assert len(set(re.findall(r"<pattern.*?</pattern>", svg, re.DOTALL))) == 5
    assert len(svg) < 60_000


def test_many_bars_carry_no_numbers():
    labels = [str(layer) for layer in range(30)]
    assert "0.123" not in texts(bars(labels, {"a": [0.123] * 30}, "y"))
    assert "0.123" in texts(bars(labels[:3], {"a": [0.123] * 3}, "y"))


def test_positions_are_logarithmic_only_over_a_wide_range():
    assert "1,024" in texts(loss_by_position({"a": [(64.0, 1.0), (1024.0, 2.0)]}))
    assert "1,024" not in texts(loss_by_position({"a": [(0.0, 1.0), (1024.0, 2.0)]}))


def test_a_missing_value_is_a_gap():
    assert loss_by_position({"a": [(1.0, 1.0), (2.0, float("nan")), (3.0, 2.0), (4.0, 2.0)]}).startswith("<svg")


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1.0, 1.0)], "b": []}])
def test_nothing_to_draw_is_an_error(series):
    with pytest.raises(ValueError, match="at least one series"):
        loss_by_position(series)


@pytest.mark.parametrize(("labels", "groups"), [([], {"a": []}), (["x"], {}), (["x"], {"a": [1.0, 2.0]})])
def test_bars_that_do_not_fit_their_labels_are_an_error(labels, groups):
    with pytest.raises(ValueError, match="bars needs labels"):
        bars(labels, groups, "y")


def test_every_cell_of_a_heat_map_says_its_number():
    words = texts(heat_map(SCORES))
    assert {"1.00", "0.50", "0.00", "\u2013", "1,024", "4,096", "0.1", "0.9", "depth"} <= words
    assert "depth" not in texts(heat_map({(None, 1024): 0.5}))
    with pytest.raises(ValueError, match="at least one score"):
        heat_map({})


def contrast(one, other):
    def luminance(rgb):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_number_is_readable_on_every_colour_and_colours_grow_lighter():
    grounds = [colour(n / 100) for n in range(101)]
    for ground in grounds:
        ink = tuple(int(ink_on(ground)[at : at + 2], 16) / 255 for at in (1, 3, 5))
        assert contrast(ink, ground) >= 4.5
    assert [contrast(ground, (0, 0, 0)) for ground in grounds] == sorted(contrast(g, (0, 0, 0)) for g in grounds)
    assert colour(-1) == grounds[0]
    assert colour(2) == grounds[-1]


def test_what_no_other_point_beats():
    assert undominated(POINTS) == ["parent", "chosen", "all local"]
    assert undominated({"a": (1, 0.5), "b": (2, 0.5), "c": (3, 0.9), "d": (3, 0.9)}, more=True) == ["a", "c", "d"]
    assert set(POINTS) <= texts(trade_off(POINTS, "cost", "loss"))
    with pytest.raises(ValueError, match="at least one point"):
        trade_off({}, "cost", "loss")


def test_many_points_get_a_legend():
    many = {f"model {n}": (float(n), 1.0) for n in range(12)}
    assert set(many) <= texts(trade_off(many, "cost", "loss"))


@pytest.mark.parametrize("label", ["$x^", "_hidden", "a\nb\tc", "模型", "</script><b>", "x" * 200, "😀"])
def test_any_label_can_be_drawn(label):
    svgs = [
        lines({label: [(1, 1.0)]}, "x", "y"),
        trade_off({label: (1, 1)}, "x", "y"),
        bars([label], {label: [1]}, "y"),
    ]
    for svg in svgs:
        assert short(label) in texts(svg) or short(label, 24) in texts(svg) or short(label, 32) in texts(svg)


def test_a_label_keeps_its_style_where_others_are_missing():
    alone = lines({"b": [(1, 1.0), (2, 2.0)]}, "x", "y", order=["a", "b"])
    assert "#d55e00" in alone
    assert "#0d7cc4" not in alone


def test_a_long_label_loses_its_middle():
    assert short("abcdefghij", 7) == "abc…hij"
    assert short("a\n b") == "a b"


def test_bars_of_layers_show_each_fill_and_sign_and_pale_the_rest():
    svg = layer_bars(*LAYERS)
    assert "layer" in texts(svg)
    first, second, pale = (svg.count(f"fill: {colour}") for colour in (COLOURS[0], COLOURS[1], COLOURS[-1]))
    assert first == 2  # the bar of layer 0, and the sign above it
    assert second  # hatched, with signs
    assert pale == 2  # layers 1 and 3
    with pytest.raises(ValueError, match="at least one layer"):
        layer_bars([], [], [])
