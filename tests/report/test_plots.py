import re
from xml.etree import ElementTree

import pytest

from masformer.report.plots import bars, loss_by_position

matplotlib = pytest.importorskip("matplotlib")

SERIES = {
    "parent": [(16, 3.5), (256, 3.0), (4096, 2.5)],
    "all local": [(16, 3.5), (256, 3.3), (4096, 3.2)],
    "chosen & <8>": [(16, 3.5), (256, 3.1), (4096, 2.6)],
}
GROUPS = {"parent": [1.0, 1.0], "chosen": [0.4, 0.25]}


def draw_both():
    return [loss_by_position(SERIES), bars(["prefill", "decode"], GROUPS, "relative cost")]


def texts(svg):
    return {
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
    }


def test_the_words_of_a_plot_stay_text():
    loss, cost = map(texts, draw_both())
    assert {*SERIES, "position in the document (tokens)", "loss (nats/token)", "4,096"} <= loss
    assert {*GROUPS, "prefill", "decode", "relative cost", "0.25"} <= cost


def test_the_same_numbers_give_the_same_bytes_whatever_the_users_settings():
    first = draw_both()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert draw_both() == first
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
    for svg in draw_both():
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "#000000" not in svg
        assert "#fdfcfb" not in svg


def test_two_plots_in_one_page_share_no_id_and_every_reference_is_met():
    ids = []
    for svg in draw_both():
        own = re.findall(r' id="([^"]+)"', svg)
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) == set(own)
        ids += own
    assert len(ids) == len(set(ids))


def test_a_plot_brings_no_style_sheet_and_asks_for_nothing_outside():
    for svg in draw_both():
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
