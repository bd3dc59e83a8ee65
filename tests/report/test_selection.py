import json

import pytest

from masformer.errors import CorruptError, InputError
from masformer.report.runs import read_results
from masformer.report.sections import sections, title, write_report
from masformer.report.selection import listed, ranks, spearman
from masformer.spans import GPT_NEO_1_3B, SpanPlan, cost

from .made import LAYERS, MEASURED, SETTINGS, everything, plan_of, write_eval, write_selection, write_train
from .test_page import Page
from .test_sections import cells

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

MINUS, DASH = "\u2212", "\u2013"


def shown(*folders):
    results = read_results(list(folders))
    return results, {section.heading: section for section in sections(results)}


def one(tmp_path, **changes):
    return shown(write_selection(tmp_path / "select", **changes))[1]["Which layers stay full"]


def test_a_table_has_the_parent_and_all_local_first_and_the_chosen_method_in_words(tmp_path):
    rows = cells(one(tmp_path), "2 full layers")
    assert [row["method"] for row in rows] == ["parent", "all local", "recall, chosen", "mass", "lazy", "top"]
    assert [row["full layers"] for row in rows] == ["0 to 23", DASH, "7, 18", "3, 4", "3, 4", "20, 21"]
    best = rows[2]
    assert [best[name] for name in ("checks: nats", "of recall", "of documents", "KL")] == [
        "5.250",
        "2.250",
        "3.000",
        "0.125",
    ]


def test_savings_are_against_the_parent_at_the_length_of_the_probes(tmp_path):
    parent, _, best, *_ = cells(one(tmp_path), "2 full layers")
    own, whole = (cost(GPT_NEO_1_3B, SpanPlan.parse(plan_of(full)), 1024) for full in ((7, 18), range(LAYERS)))
    assert (parent["KV saved"], parent["FLOPs saved"]) == ("0.0 %", "0.0 %")
    assert best["KV saved"] == "68.8 %"  # a window holds 251 keys and 4 sinks: 1 - (2 * 1024 + 22 * 255) / (24 * 1024)
    flops = own.prefill_flops.attention / whole.prefill_flops.attention
    assert best["FLOPs saved"] == f"{100 * (1 - flops):.1f} %"


def test_held_out_numbers_have_intervals_and_are_compared_with_the_parent(tmp_path):
    parent, local, best, mass, lazy, _ = cells(one(tmp_path), "2 full layers")
    assert parent["held-out: nats/token"] == "2.050"
    assert parent["difference"] == DASH
    names = ("held-out: nats/token", "difference", "95 % interval of it", "recall", "95 % interval", "log p")
    values = ["2.150", "+0.100", "+0.100 to +0.100", "75.0 %", "30.1 to 95.4 %", f"{MINUS}1.88"]
    assert [best[name] for name in names] == values  # Wilson of 3 in 4
    assert (local["difference"], local["recall"]) == ("+0.600", "0.0 %")
    assert [mass[name] for name in names] == [lazy[name] for name in names]


def test_words_say_what_was_asked_what_was_chosen_and_what_it_costs(tmp_path):
    section = one(tmp_path)
    asked, chosen = section.paragraphs
    assert asked == (
        "Some layers of models/parent stay as they are, the others get window:252:sinks=4. The methods chose by the "
        "probes, 4 recall items and 1 document of 1,024 tokens (seed 0, float32 on cpu), and are compared on checks, "
        "other recall items and documents. A plan's nats are the mean per token of the answers plus that of the "
        "documents, and the plan of the fewest is chosen. "
        "Held-out data had no say."
    )
    assert chosen.startswith("2 full layers: recall measures best on the checks. full 7,18 needs 86.0 % less KV cache ")
    assert chosen.endswith(
        "Its loss is 0.100 nats per token higher (95 % interval +0.100 to +0.100); it finds 75.0 % of the recall "
        "items, parent 100.0 %."
    )
    best = SpanPlan.parse(plan_of((7, 18)))
    assert section.verbatim == [f"2 full layers: --plan {best}"]


def test_orders_on_probes_and_on_held_out_data_are_compared_over_distinct_plans(tmp_path):
    (row,) = cells(one(tmp_path), "How far")
    assert list(row.values()) == ["2 full layers", "checks and held-out", "3", "+1.00", "+1.00"]


TRAINED = {
    "parent": (190.0, (1, 1, 1, 1)),
    "all local": (230.0, (0, 0, 0, 0)),
    "full 20,21": (200.0, (1, 1, 1, 0)),
    "full 7,18": (210.0, (1, 1, 0, 0)),
    "full 3,4": (220.0, (1, 1, 0, 0)),
}


def test_trained_plans_are_compared_with_the_trained_parent(tmp_path):
    section = one(tmp_path, trained=TRAINED)
    parent, _, best, *_ = cells(section, "2 full layers")
    assert (parent["trained: nats/token"], parent["difference, trained"]) == ("1.950", DASH)
    assert (best["trained: nats/token"], best["difference, trained"]) == ("2.150", "+0.200")
    assert (best["difference"], best["recall, trained"]) == ("+0.100", "50.0 %")
    assert section.paragraphs[0].endswith(
        "Each plan was then trained for 20 steps, and is compared with the parent trained as long."
    )
    assert section.paragraphs[2] == (
        "full 7,18, trained against parent, trained: its loss is 0.200 nats per token higher (95 % interval +0.200 to "
        "+0.200); it finds 50.0 % of the recall items, parent, trained 100.0 %."
    )


def test_whether_the_order_held_is_said_and_counted(tmp_path):
    # By loss 3, 1, 2 before and 1, 2, 3 after: 1 - 6 * (4 + 1 + 1) / (3 * 8). By wrong answers the ranks are
    # 3, 1, 2 and 1, 2.5, 2.5: deviations (1, -1, 0) and (-1, .5, .5), so -1.5 / sqrt(2 * 1.5).
    section = one(tmp_path, trained=TRAINED)
    assert section.paragraphs[3] == (
        "Rank correlation of the 3 plans on held-out data before and after the training: "
        f"by loss {MINUS}0.50, by recall {MINUS}0.87 (Spearman's; +1 is the same order, 0 none)."
    )
    rows = [list(row.values())[1:] for row in cells(section, "How far")]
    assert rows == [
        ["checks and held-out", "3", "+1.00", "+1.00"],
        ["checks and trained", "3", f"{MINUS}0.50", f"{MINUS}0.87"],
        ["held-out and trained", "3", f"{MINUS}0.50", f"{MINUS}0.87"],
    ]


def test_a_training_that_is_going_on_leaves_dashes_and_compares_nothing(tmp_path):
    section = one(tmp_path, trained={"parent": TRAINED["parent"], "all local": TRAINED["all local"]})
    best = cells(section, "2 full layers")[2]
    assert (best["trained: nats/token"], best["recall, trained"]) == (DASH, DASH)
    assert section.paragraphs[2] == "Of 0 plans no order can be compared before and after the training."


def test_plans_that_are_compared_on_the_probes_say_so(tmp_path):
    folder = write_selection(tmp_path / "select")
    file = folder / "selection.json"
    found = json.loads(file.read_text())
    found["facts"]["checks"] = found["facts"]["probes"]
    file.write_text(json.dumps(found))
    section = shown(folder)[1]["Which layers stay full"]
    assert "and are compared on these. A plan's nats" in section.paragraphs[0]
    assert section.paragraphs[1].startswith("2 full layers: recall measures best on the probes.")
    assert "probes: nats" in section.tables[0].headers


def test_before_anything_was_tried_the_probes_are_shown(tmp_path):
    folder = write_selection(tmp_path / "select", tried={})
    _, found = shown(folder)
    assert list(found) == ["Which layers stay full", "Scores by layer", "How this was made"]
    section = found["Which layers stay full"]
    assert "held-out: nats/token" not in section.tables[0].headers
    assert section.paragraphs[0].endswith("Nothing was tried on held-out data yet.")
    assert section.paragraphs[1] == "2 full layers: recall measures best on the checks."
    assert len(section.tables) == 1
    write_eval(folder / "held-out", [])
    assert list(shown(folder)[1]) == list(found)


def test_scores_by_layer_are_pictures_and_a_table(tmp_path):
    section = shown(write_selection(tmp_path / "select"))[1]["Scores by layer"]
    assert [figure.caption for figure in section.figures] == ["recall", "mass"]
    assert section.figures[0].alt == "Scores of recall by layer, highest at 0, 1, 7, 18; numbers in the table"
    assert all(figure.small and "layer" in figure.svg for figure in section.figures)
    rows = cells(section, "Scores by layer")
    assert len(rows) == LAYERS
    assert rows[7] == {"layer": "7", "recall": "0.5000", "mass": "0.5000", "chosen with 2 full layers": "full"}
    assert rows[20]["recall"] == f"{MINUS}0.2000"
    assert section.paragraphs[1] == (
        "Bars of layers that the method keeps full are solid under the budget of 2 full layers; pale ones stay local. "
        "Signs above the bars show the full layers of the plan that was chosen in the end: circles with 2 full layers "
        "(recall)."
    )


def test_without_scores_there_is_no_section_of_them(tmp_path):
    _, found = shown(write_selection(tmp_path / "select", scores=()))
    assert "Scores by layer" not in found


def test_the_held_out_evaluation_and_the_trainings_are_in_the_usual_sections(tmp_path):
    folder = write_selection(tmp_path / "select", trained=TRAINED)
    results, found = shown(folder)
    alone = read_results([folder / "held-out"])
    assert list(results.models) == list(alone.models)
    assert results.records == alone.records
    assert title(results) == "Which layers of parent stay full"
    assert {"What was gained and lost", "The plans", "Loss by position", "Recall", "Training"} <= set(found)
    names = {row["run"] for row in cells(found["Training"], "Losses")}
    assert names == {f"{name}-ab12cd" for name in ("parent", "all-local", "full-20-21", "full-7-18", "full-3-4")}


def test_what_lies_in_a_selection_counts_once(tmp_path):
    folder = write_selection(tmp_path / "select", trained=TRAINED)
    results = read_results([folder / "held-out", folder, folder / "training" / "parent-ab12cd"])
    assert list(results.evaluations) == ["select"]
    assert len(results.trainings) == 5


def test_selections_of_several_seeds_are_told_apart_by_their_folders(tmp_path):
    folders = [
        write_selection(
            tmp_path / f"select-{seed}",
            seed=seed,
            trained={label: (nats + 10 * seed, scores) for label, (nats, scores) in TRAINED.items()},
            tried={label: (nats + 10 * seed, scores) for label, (nats, scores) in MEASURED.items()},
            settings={**SETTINGS, "seed": seed, "data": f"d{seed}"},
        )
        for seed in range(2)
    ]
    results, found = shown(*folders)
    assert list(results.models)[:2] == ["parent (select-0)", "all local (select-0)"]
    assert results.models["full 7,18 (select-1)"].reference == "parent (select-1)"
    assert list(found)[:4] == [
        "Which layers stay full: select-0",
        "Scores by layer: select-0",
        "Which layers stay full: select-1",
        "Scores by layer: select-1",
    ]
    first, second = (cells(found[f"Which layers stay full: select-{seed}"], "2 full layers")[2] for seed in range(2))
    assert (first["held-out: nats/token"], first["difference"]) == ("2.150", "+0.100")
    assert (second["held-out: nats/token"], second["difference"]) == ("2.250", "+0.100")
    assert [run.name for run in results.trainings][:2] == [
        "all-local-ab12cd (select-0)",
        "full-20-21-ab12cd (select-0)",
    ]
    assert title(results) == "Which layers of parent stay full"


def test_seeds_with_the_same_held_out_documents_have_their_own_parent_in_their_table(tmp_path):
    folders = [
        write_selection(tmp_path / name, tried={label: (nats * factor, s) for label, (nats, s) in MEASURED.items()})
        for name, factor in (("a", 1.0), ("b", 2.0))
    ]
    results, found = shown(*folders)
    assert results.models["parent (b)"].reference == "parent (a)"
    parent, _, best, *_ = cells(found["Which layers stay full: b"], "2 full layers")
    assert (parent["difference"], best["difference"]) == (DASH, "+0.200")


def test_of_many_models_the_pictures_are_of_those_that_were_chosen(tmp_path):
    folders = [write_selection(tmp_path / name, trained=TRAINED) for name in ("a", "b")]  # 20 models
    results, found = shown(*folders)
    labels = [f"{label}{ending}" for ending in ("", ", trained") for label in ("parent", "all local", "full 7,18")]
    drawn = [f"{label} ({name})" for name in ("a", "b") for label in labels]
    assert sorted(results.drawn) == sorted(drawn)
    assert len(found["Recall"].figures) == len(drawn)
    assert len(cells(found["Recall"], "Recall by task and length")) == 20
    assert len(found["What was gained and lost"].paragraphs) == len(drawn) - 1
    assert found["Which layers stay full: a"].paragraphs[-1].startswith("Further down")
    assert len(results.drawn_trainings) == 10  # as few as can be drawn
    write_selection(tmp_path / "c", trained=TRAINED)
    results, found = shown(*folders, tmp_path / "c")
    assert len(results.drawn_trainings) == 9
    assert found["Training"].paragraphs[-1] == "The other 6 trainings of plans that were not chosen are in the table."


def test_several_sizes_are_shown_as_spans(tmp_path):
    folder = write_selection(tmp_path / "select", tried={}, scores=())
    found = json.loads((folder / "selection.json").read_text("utf-8"))
    found["facts"]["local"].append("window:512:sinks=4")
    found["budgets"][0]["plans"]["recall"]["plan"] = "full*2,window:252:sinks=4*20,window:512:sinks=4*2"
    (folder / "selection.json").write_text(json.dumps(found), "utf-8")
    rows = cells(shown(folder)[1]["Which layers stay full"], "2 full layers")
    assert rows[2]["spans"] == "2 full, 20 window 252 + 4 sinks, 2 window 512 + 4 sinks"


def test_a_page_holds_evaluations_trainings_and_selections(tmp_path):
    folders = [write_eval(tmp_path / "eval", everything(documents=2)), write_train(tmp_path / "train")]
    folders += [write_selection(tmp_path / name, trained=TRAINED) for name in ("a", "b")]
    page = Page(write_report(folders, tmp_path / "report.html").read_text("utf-8"))
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "recall, chosen" in [text for _, text in page.all("th")]


def damage(found, *path, value=None):
    *parts, last = path
    for part in parts:
        found = found[part]
    if value is None:
        del found[last]
    else:
        found[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("facts",), None),
        (("facts", "local"), None),
        (("facts", "length"), "long"),
        (("budgets",), {"a": 1}),
        (("budgets", 0, "chosen"), "none"),
        (("budgets", 0, "plans", "top", "plan"), "fool*24"),
        (("budgets", 0, "plans", "top", "plan"), "full*23"),
        (("budgets", 0, "plans", "top", "nats"), "few"),
        (("budgets", 0, "plans", "top", "kl"), float("nan")),
        (("budgets", 0, "plans", "top", "cost"), {}),
        (("parent", "label"), None),
        (("scores",), []),
        (("scores", "recall"), [0.5]),
        (("scores", "recall", 3), "high"),
        (("train_steps",), None),
    ],
)
def test_a_selection_that_cannot_be_read_is_damage(tmp_path, path, value):
    folder = write_selection(tmp_path / "select")
    found = json.loads((folder / "selection.json").read_text("utf-8"))
    damage(found, *path, value=value)
    (folder / "selection.json").write_text(json.dumps(found), "utf-8")
    with pytest.raises(CorruptError, match=r"selection\.json cannot be read: \S"):
        read_results([folder])


def test_damage_is_refused_by_the_file_it_is_in(tmp_path):
    folder = write_selection(tmp_path / "select", trained=TRAINED)
    (folder / "training" / "parent-ab12cd" / "recipe.json").write_text("{", "utf-8")
    with pytest.raises(CorruptError, match=r"recipe\.json is damaged"):
        read_results([folder])
    with (folder / "held-out" / "results.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(CorruptError, match=r"results\.jsonl, line 61"):
        read_results([folder])
    (folder / "selection.json").write_text('{"format": 2,', "utf-8")
    with pytest.raises(CorruptError, match=r"selection\.json is damaged"):
        read_results([folder])
    (folder / "selection.json").write_text('{"format": 3}', "utf-8")
    with pytest.raises(InputError, match="format 3"):
        read_results([folder])


def test_ranks_share_places_and_correlate():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([(1, 10), (2, 20), (3, 15), (4, 40)]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([(1, 4), (2, 3), (3, 1)]) == pytest.approx(-1)
    assert spearman([(1, 1), (1, 2), (1, 3)]) is None  # all equal
    assert spearman([(1, 1), (2, 2), (3, None)]) is None  # two are no order


@pytest.mark.parametrize(
    ("layers", "words"),
    [((), DASH), ((4,), "4"), ((4, 5), "4, 5"), ((0, 1, 2), "0 to 2"), ((0, 4, 5, 6, 9, 10), "0, 4 to 6, 9, 10")],
)
def test_layers_are_listed_with_runs(layers, words):
    assert listed(layers) == words
