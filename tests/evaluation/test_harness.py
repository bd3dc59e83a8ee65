"""Tasks of lm-evaluation-harness on a converted model, against a plain loop over the model's own logits."""

import json
import logging
import math
import os
import random
import sys

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from masformer.errors import InputError
from masformer.evaluation import harness
from masformer.evaluation.harness import Size, check_tasks, longest_request, run_tasks
from masformer.evaluation.suites import Data, Settings, Subject, prepare
from masformer.models.convert import applied
from masformer.spans import SpanPlan

from ..small import TEXT, small_llama, small_tokenizer

POSITIONS, NEW = 40, 6
LOCAL = SpanPlan.parse("window:3,block:4")
WORDS = TEXT.split()

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TAIL = """
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: " {{tail}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{tail}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATE = f"""
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: gold
generation_kwargs: {{until: ["<bot>"], max_gen_toks: {NEW}}}
metric_list: [{{metric: exact_match}}]
"""
GROUP = """
group: both
task: [choice, choice_again]
aggregate_metric_list: [{metric: acc}]
"""
SHUFFLED = """
num_fewshot: 3
fewshot_split: test
process_docs: !function shuffle.shuffled
"""
SHUFFLE = """
import random, numpy, torch

def shuffled(docs):
    some = lambda: random.randrange(9) + numpy.random.randint(9) + torch.randint(9, ()).item()
    return docs.map(lambda doc: {"prompt": doc["prompt"] + " the" * some()}, load_from_cache_file=False)
"""
METRIC_OF_THE_HUB = """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: gold
metric_list: [{metric: bertscore, hf_evaluate: true}]
"""


def prompt_of(words, seed=0):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def tokens_of(count):
    """A text of so many tokens."""
    return " ".join(["the"] * count)


def choice_documents():
    choices = [["fox", "lazy dog", "quick brown fox jumps"], ["dog", "away.", "runs", "the"]]
    return [{"prompt": prompt_of(2 + i, i), "choices": choices[i % 2], "answer": i % 3} for i in range(10)]


def tail_documents():
    """The first two are the same tokens up to the last one, split at different places."""
    split = [{"prompt": "the quick", "tail": "brown fox"}, {"prompt": "the quick brown", "tail": "jumps"}]
    return split + [{"prompt": prompt_of(2 + i, i), "tail": "lazy dog runs"} for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    changes = {"num_hidden_layers": 2, "max_position_embeddings": POSITIONS, "initializer_range": 0.5}
    return small_llama(tokenizer, **changes)


@pytest.fixture
def local(model):
    with applied(model, LOCAL):
        yield model


def generated(model, tokenizer, prompt):
    """The prompt alone, without padding."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model, tokenizer):
    """A folder of tasks; the odd documents of "generate" have as gold what the model with local spans says."""
    folder, patch = tmp_path_factory.mktemp("tasks"), pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def add(name, kind, documents):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in documents))
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(data + kind)

    prompts = [prompt_of(3 + 2 * i, i) for i in range(6)]
    with applied(model, LOCAL):
        said = [generated(model, tokenizer, prompt) for prompt in prompts]
    gold = [text if i % 2 else "something else" for i, text in enumerate(said)]
    add("choice", CHOICE, choice_documents())
    add("choice_again", CHOICE, choice_documents()[:3])
    add("tail", TAIL, tail_documents())
    add("generate", GENERATE, [{"prompt": p, "gold": g} for p, g in zip(prompts, gold, strict=True)])
    for name, more in (("fits", 0), ("too_long", 1)):
        answer = {"tail": "the", "gold": "?"}  # one token, which is only predicted
        add(
            f"tail_{name}",
            TAIL,
            [{"prompt": prompt_of(3), **answer}, {"prompt": tokens_of(POSITIONS + more), **answer}],
        )
        add(f"generate_{name}", GENERATE, [{"prompt": tokens_of(POSITIONS - NEW + more), **answer}])
    bos = {"prompt": "<s>" + tokens_of(4), "tail": "fox", "gold": "?"}  # what begins so gets no other begin token
    add("tail_begin", TAIL, [bos, {"prompt": "", "tail": tokens_of(4)}, {"prompt": "the ", "tail": "fox"}])
    add("generate_begin", GENERATE, [{"prompt": tokens_of(2), "gold": "?"}, bos])
    add("shuffled", TAIL + SHUFFLED, tail_documents())
    add("shuffled_generate", GENERATE + SHUFFLED, [{"prompt": prompt_of(2 + i, i), "gold": "?"} for i in range(5)])
    (folder / "shuffle.py").write_text(SHUFFLE)
    add("no_answer", TAIL.replace(" {{tail}}", "{{tail}}"), [{"prompt": "the", "tail": ""}])
    add("no_prompts", TAIL.replace("{{prompt}}", "{{1 // number}}"), [{"number": n, "tail": "fox"} for n in (1, 0)])
    add("hub_metric", METRIC_OF_THE_HUB, [{"prompt": "the", "gold": "?"}])
    add("rolling", ROLLING, [{"tail": tokens_of(POSITIONS + 9)}])
    (folder / "both.yaml").write_text(GROUP)
    (folder / "elsewhere.yaml").write_text(f"task: elsewhere\ndataset_path: nobody/nothing\ntest_split: test\n{TAIL}")
    yield folder
    patch.undo()


def log_likelihood(model, tokenizer, prompt, answer):
    """Of the answer after a space, from the logits of a plain call; and whether it is the greedy continuation."""
    before, ids = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    target = torch.tensor(ids[len(before) :])
    return float(log_p.gather(1, target[:, None]).sum()), bool((log_p.argmax(-1) == target).all())


def hits(model, tokenizer):
    """1 for each question that the model answers rightly."""
    found = []
    for one in choice_documents():
        scores = [log_likelihood(model, tokenizer, one["prompt"], choice)[0] for choice in one["choices"]]
        found.append(float(max(range(len(scores)), key=scores.__getitem__) == one["answer"]))
    return found


def by_metric(rows):
    return {(row["task"], row["metric"]): row for row in rows}


@pytest.mark.parametrize("batch", [1, 4])
def test_accuracy_is_that_of_plain_logits(local, tokenizer, tasks, batch):
    (row,) = run_tasks(local, tokenizer, ["choice"], batch=batch, include=tasks)
    expected = hits(local, tokenizer)
    share = sum(expected) / len(expected)
    assert 0 < share < 1
    assert row == {
        "task": "choice",
        "metric": "acc",
        "value": pytest.approx(share),
        "stderr": pytest.approx(math.sqrt(share * (1 - share) / (len(expected) - 1))),
        "items": len(expected),
        "values": expected,
    }


@pytest.mark.parametrize("batch", [1, 4])
def test_log_likelihoods_are_those_of_plain_logits(local, tokenizer, tasks, batch):
    rows = by_metric(run_tasks(local, tokenizer, ["tail"], batch=batch, include=tasks))
    documents = tail_documents()
    expected = [log_likelihood(local, tokenizer, one["prompt"], one["tail"]) for one in documents]
    row = rows["tail", "perplexity"]
    assert row["values"] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert row["value"] == pytest.approx(math.exp(-sum(row["values"]) / len(documents)), rel=1e-6)
    assert row["stderr"] > 0
    assert rows["tail", "acc"]["values"] == [float(greedy) for _, greedy in expected]


def test_a_text_beyond_the_positions_is_scored_in_windows(local, tokenizer, tasks):
    """Every token once: the first as many as there are positions, the others with as much context as fits."""
    (row,) = run_tasks(local, tokenizer, ["rolling"], include=tasks)
    text = tokens_of(POSITIONS + 9)
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    nats = 0.0
    for window, predicted in ((ids[: POSITIONS + 1], POSITIONS), (ids[-POSITIONS - 1 :], 9)):
        with torch.no_grad():
            log_p = local(window[None, :-1]).logits[0].log_softmax(-1)
        nats -= float(log_p.gather(1, window[1:, None])[-predicted:].sum())
    assert row["value"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    assert row["values"] is None


@pytest.mark.parametrize("batch", [1, 4])
def test_generation_gives_what_the_model_says_without_padding(local, tokenizer, tasks, batch):
    (row,) = run_tasks(local, tokenizer, ["generate"], batch=batch, include=tasks)
    assert (row["metric"], row["value"], row["values"]) == ("exact_match", 0.5, [0, 1, 0, 1, 0, 1])


def test_generation_heeds_neither_the_models_own_length_nor_a_pad_token_without_embedding(local, tasks, monkeypatch):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == local.config.vocab_size
    monkeypatch.setattr(local.generation_config, "max_new_tokens", POSITIONS)
    (row,) = run_tasks(local, tokenizer, ["generate"], batch=4, include=tasks)
    assert row["values"] == [0, 1, 0, 1, 0, 1]


def test_standard_errors_are_computed_in_this_process(local, tokenizer, tasks, monkeypatch):
    monkeypatch.setattr("multiprocessing.Pool", None)
    assert by_metric(run_tasks(local, tokenizer, ["tail"], include=tasks))["tail", "perplexity"]["stderr"] > 0
    assert "DISABLE_MULTIPROC" not in os.environ


def test_spans_make_a_difference_and_an_all_full_plan_none(model, tokenizer, tasks):
    names = ["choice", "tail", "generate"]
    parent = run_tasks(model, tokenizer, names, batch=3, include=tasks)
    with applied(model, SpanPlan.parse("full,full")):
        assert run_tasks(model, tokenizer, names, batch=3, include=tasks) == parent
    with applied(model, LOCAL):
        local = by_metric(run_tasks(model, tokenizer, names, batch=3, include=tasks))
    for key in (("tail", "perplexity"), ("generate", "exact_match")):
        assert local[key]["values"] != by_metric(parent)[key]["values"]


def test_rows_are_those_of_simple_evaluate(local, tokenizer, tasks):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names, seed = ["both", "generate"], 3
    rows = run_tasks(local, tokenizer, names, include=tasks, seed=seed, limit=2)
    lm = HFLM(pretrained=local, tokenizer=small_tokenizer(), max_length=POSITIONS)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    theirs = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, limit=2, fewshot_random_seed=seed)[
        "results"
    ]
    assert [row["task"] for row in rows] == ["choice", "choice_again", "generate", "both"]
    for row in rows:
        theirs_row = theirs[row["task"]]
        assert row["value"] == theirs_row[f"{row['metric']},none"]
        assert row["stderr"] == pytest.approx(theirs_row[f"{row['metric']}_stderr,none"])
        assert row["items"] == theirs_row["sample_len"]
    assert rows[-1]["values"] is None


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("tail", "41 tokens and an answer of 1 tokens"), ("generate", "35 tokens and up to 6 generated")],
)
def test_what_does_not_fit_is_refused_and_not_cut(local, tokenizer, tasks, kind, tokens):
    assert run_tasks(local, tokenizer, [f"{kind}_fits"], include=tasks)
    with pytest.raises(InputError, match=f"'{kind}_too_long': a prompt of {tokens}.* the model's 40 positions"):
        run_tasks(local, tokenizer, [f"{kind}_too_long"], batch=2, include=tasks)


def subject_of(tokenizer, label="model", **changes):
    """A model that must not be loaded."""

    def load():
        raise AssertionError("the weights were read")

    config = small_llama(tokenizer, **{"max_position_embeddings": POSITIONS, **changes}).config
    return Subject(label, label, config, SpanPlan.parse("full"), tokenizer, load)


def prepared(tasks, *names, subjects, **rest):
    return prepare(subjects, Settings(suites=("lm-eval",), harness=names, include=tasks, **rest), Data())


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("tail", "41 tokens and an answer of 1 tokens"), ("generate", "35 tokens and up to 6 generated")],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(tokenizer, tasks, kind, tokens):
    fits, message = [f"{kind}_fits", "rolling"], f"'{kind}_too_long': a prompt of {tokens}.* the model's 40 positions"
    (entries,) = prepared(tasks, *fits, subjects=[subject_of(tokenizer)])
    assert [entry.task for entry in entries] == fits
    with pytest.raises(InputError, match=message):
        prepared(tasks, *fits, f"{kind}_too_long", subjects=[subject_of(tokenizer)])
    if kind == "tail":  # its long document is the second one
        prepared(tasks, "tail_too_long", subjects=[subject_of(tokenizer)], limit=1)


def test_every_model_must_have_the_positions(tokenizer, tasks):
    long = subject_of(tokenizer, "long", max_position_embeddings=POSITIONS + 1)
    short = subject_of(small_tokenizer(), "short")
    assert long.mark == short.mark
    assert len(prepared(tasks, "tail_fits", subjects=[long, short])) == 2
    for subjects in ([long, short], [short, long]):
        with pytest.raises(InputError, match=r"'tail_too_long'.*the model's 40 positions"):
            prepared(tasks, "tail_too_long", subjects=subjects)
    prepared(tasks, "tail_too_long", subjects=[long])


def test_a_tokenizer_that_names_other_special_tokens_is_looked_at_by_itself(tokenizer, tasks):
    """Though it encodes alike: lm-eval needs an end token, and sees by the begin token whether a text has one."""
    other = small_tokenizer()
    other.eos_token = None
    assert subject_of(tokenizer).mark == subject_of(other).mark
    with pytest.raises(InputError, match="the tokenizer of other has no end token"):
        prepared(tasks, "choice", subjects=[subject_of(tokenizer), subject_of(other, "other")])


def with_begin_token(tokenizer):
    """A tokenizer that puts it before every text, as Llama's does."""
    begin = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    return tokenizer


def asked_of(model, monkeypatch):
    """The positions of each call of the model, filled while it runs with a batch of one."""
    positions, forward, generate = [], model.forward, model.generate

    def spied_forward(input_ids=None, **rest):
        positions.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **rest)

    def spied_generate(input_ids, max_new_tokens, **rest):
        positions.append(input_ids.shape[1] + max_new_tokens)
        return generate(input_ids, max_new_tokens=max_new_tokens, **rest)

    monkeypatch.setattr(model, "forward", spied_forward)
    monkeypatch.setattr(model, "generate", spied_generate)
    return positions


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize(
    "name", ["choice", "tail", "tail_begin", "generate", "generate_begin", "both", "shuffled", "shuffled_generate"]
)
def test_what_is_counted_is_what_the_model_is_asked(tasks, name, begin, monkeypatch):
    tokenizer = with_begin_token(small_tokenizer()) if begin else small_tokenizer()
    model = small_llama(tokenizer, max_position_embeddings=999)
    how = {"include": tasks, "seed": 3}
    counted = longest_request(model.config, tokenizer, [name], **how)
    random.random(), np.random.rand(), torch.rand(1)  # what else is drawn makes no difference
    with monkeypatch.context() as patch:
        asked = asked_of(model, patch)
        run_tasks(model, tokenizer, [name], **how)
    assert counted.positions == max(asked)
    model.config.max_position_embeddings = counted.positions
    counted.check(model.config)
    assert run_tasks(model, tokenizer, [name], **how)
    model.config.max_position_embeddings -= 1
    messages = []
    for refuses in (lambda: counted.check(model.config), lambda: run_tasks(model, tokenizer, [name], **how)):
        with pytest.raises(InputError, match="nothing is cut") as caught:
            refuses()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_what_is_counted_depends_on_seed_and_limit(model, tokenizer, tasks):
    sizes = {longest_request(model.config, tokenizer, ["shuffled"], include=tasks, seed=seed) for seed in range(4)}
    assert len(sizes) > 1
    assert longest_request(model.config, tokenizer, ["tail_too_long"], include=tasks, limit=1).positions < POSITIONS
    assert longest_request(model.config, tokenizer, ["rolling"], include=tasks) is None
    longest = longest_request(model.config, tokenizer, ["tail_too_long", "generate"], include=tasks)
    assert longest == Size("tail_too_long", 1, POSITIONS + 1, 1, generated=False)


def test_counting_prints_and_changes_nothing(model, tasks, capfd):
    tokenizer = small_tokenizer()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for name in ("shuffled", "shuffled_generate", "generate"):
        longest_request(model.config, tokenizer, [name], include=tasks, seed=7)
    assert capfd.readouterr() == ("", "")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert tokenizer.pad_token is None
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("elsewhere", "cannot load elsewhere, or the data they need: .*nobody/nothing"),
        ("hub_metric", "the metric 'bertscore' is a script of the Hub"),
        ("no_prompts", "cannot make the prompts of no_prompts: ZeroDivisionError"),
        ("no_answer", "task 'no_answer' has an answer of no tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_weights_are_read(tokenizer, tasks, task, message):
    with pytest.raises(InputError, match=message) as caught:
        prepared(tasks, "choice", task, subjects=[subject_of(tokenizer)])
    assert "\n" not in str(caught.value)


def test_what_is_no_task_is_refused(tasks, tmp_path):
    check_tasks(["choice", "both", "hellaswag", "mmlu"], tasks)
    with pytest.raises(InputError, match=r"unknown task 'helaswag' among the [\d,]+ of lm-eval and .*: is .*hellaswag"):
        check_tasks(["choice", "helaswag"], tasks)
    with pytest.raises(InputError, match=r"unknown task 'qqqqqqqq'.*'lm-eval ls tasks'"):
        check_tasks(["qqqqqqqq"], tasks)
    with pytest.raises(InputError, match="no task is named"):
        check_tasks([])
    with pytest.raises(InputError, match="missing is not a folder of tasks"):
        check_tasks(["choice"], tmp_path / "missing")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("elsewhere", "cannot load elsewhere, or the data they need: .*nobody/nothing"),
        ("hub_metric", "the metric 'bertscore' is a script of the Hub"),
        ("humaneval", "the metric 'code_eval' is a script of the Hub"),
    ],
)
def test_what_the_network_would_have_to_bring_is_refused_in_one_line(local, tokenizer, tasks, task, message):
    with pytest.raises(InputError, match=message) as caught:
        run_tasks(local, tokenizer, [task], include=tasks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("wrong", "message"), [({"limit": 0}, "limit of 0"), ({"batch": 0}, "batch of 0")])
def test_numbers_that_mean_nothing_are_refused(local, tokenizer, tasks, wrong, message):
    with pytest.raises(InputError, match=message):
        run_tasks(local, tokenizer, ["choice"], include=tasks, **wrong)


def test_nothing_is_printed_or_changed(local, tasks, capfd):
    tokenizer = small_tokenizer()
    local.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = run_tasks(local, tokenizer, ["generate", "tail", "tail_fits"], include=tasks)
    assert capfd.readouterr() == ("", "")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert local.training
    assert tokenizer.pad_token is None
    assert logging.root.manager.disable == logging.NOTSET
    local.eval()
    assert run_tasks(local, tokenizer, ["generate", "tail", "tail_fits"], include=tasks) == first


def test_a_tokenizer_without_end_token_is_refused(local, tasks):
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        run_tasks(local, tokenizer, ["choice"], include=tasks)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    harness._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(InputError, match=r"the harness needs lm_eval.*: pip install 'masformer\[harness\]'"):
        check_tasks(["hellaswag"])
