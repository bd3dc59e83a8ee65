"""What is known of a run before it begins: its data, its cost, whether it fits, and which other run it could go on."""

import collections
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from masformer.data.mixture import Mixture
from masformer.errors import InputError, ResourceError
from masformer.models.checkpoint import load
from masformer.models.convert import convert
from masformer.models.positions import max_positions
from masformer.spans import PlanError, SpanPlan, cost
from masformer.training.prepare import prepare
from masformer.training.recipe import Recipe, read_recipe
from tests.small import TEXT, small_llama, small_tokenizer

LAYERS, POSITIONS = 4, 1024
PLAN = "full*2,window:16:sinks=2*2"


def write_documents(file, numbers):
    """One document per number, all of them different and of different lengths."""
    lines = [json.dumps({"text": f"{number} {TEXT * (3 + number % 7)}{'ab' * number}"}) for number in numbers]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models `model` and `wide`, documents and the cache of their tokens."""
    folder = tmp_path_factory.mktemp("prepare")
    tokenizer = small_tokenizer()
    for name, size in {"model": 16, "wide": 128}.items():
        sizes = {"hidden_size": size, "intermediate_size": 4 * size, "num_key_value_heads": 1}
        model = small_llama(tokenizer, **sizes, num_hidden_layers=LAYERS, max_position_embeddings=POSITIONS)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_documents(folder / "texts.jsonl", range(20))
    write_documents(folder / "others.jsonl", range(20, 23))
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    """A recipe with changes."""
    settings = {
        "model": str(place / "model"),
        "output": str(tmp_path / "run"),
        "plan": PLAN,
        "data": {"documents": str(place / "texts.jsonl"), "lengths": 64, "cache": str(place / "cache")},
        "training": {"steps": 10, "batch": 2},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return lambda *changes: read_recipe(file, changes)


def copied(model, folder, **changes):
    """The model folder once more, with another config."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


DATA = {
    "packed": [],
    "single": ["data.mode=single"],
    "without end tokens": ["data.end_token=false"],
    "curriculum": ["data.lengths=[[0, 32], [3, 48], [7, 100]]"],
    "recall": ["data.lengths=600", "data.recall={share: 0.3}", "training.steps=12"],
    "everything": ["data.lengths=[[0, 600], [4, 700]]", "data.recall={share: 0.5}", "data.mode=single"],
}


@pytest.mark.parametrize("changes", DATA.values(), ids=DATA.keys())
def test_the_facts_are_what_is_read(recipe, changes):
    prepared = prepare(recipe(*changes))
    facts, training = prepared.facts(), prepared.recipe.training
    count = training.steps * training.batch
    sequences = [prepared.train.sequence(index) for index in range(count)]
    assert facts["steps"] == training.steps
    assert facts["tokens"] == sum(len(sequence.input_ids) for sequence in sequences)
    assert facts["longest"] == max(len(sequence.input_ids) for sequence in sequences)
    kinds = ["documents"] * count
    if isinstance(prepared.train, Mixture):
        kinds = [prepared.train.choice(index) for index in range(count)]
    read = facts["read"]
    assert {kind: read[f"{kind}_sequences"] for kind in kinds} == collections.Counter(kinds)
    texts = [sequence for kind, sequence in zip(kinds, sequences, strict=True) if kind == "documents"]
    assert read["padded"] == sum(sequence.padding for sequence in texts)
    assert read["tokens"] == sum(len(sequence.input_ids) - sequence.padding for sequence in texts)
    begins = [sequence.position_ids[: len(sequence.input_ids) - sequence.padding] == 0 for sequence in texts]
    assert read["pieces"] == sum(int(begin.sum()) for begin in begins)
    source = prepared.train.parts["documents"] if isinstance(prepared.train, Mixture) else prepared.train
    pieces = [piece for index in range(len(texts)) for piece in source.pieces(index)]
    assert read["documents"] == sum(piece.start == 0 for piece in pieces)


def test_the_facts_count_the_documents_of_both_sides(recipe):
    prepared = prepare(recipe("data.held_out=0.25"))
    facts = prepared.facts()
    for counts, side, number in ((facts["documents"], prepared.corpus, 15), (facts["held_out"], prepared.aside, 5)):
        lengths = [len(side.document(index)) for index in range(len(side))]
        assert counts == {"documents": number, "tokens": sum(lengths), "longest": max(lengths), "empty": 0}
    assert (facts["plan"], facts["full_layers"]) == (PLAN, [0, 1])
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("distill", [0, 0.5])
def test_flops_are_those_of_the_spans(recipe, distill):
    lengths = ["data.lengths=[[0, 32], [4, 128]]", "training.batch=3"]
    prepared = prepare(recipe(*lengths, f"training.distill={distill}"))
    own, full = (
        [cost(prepared.shape, SpanPlan.parse(plan), length).training_flops.total for length in (32, 128)]
        for plan in (PLAN, "full*4")
    )
    facts = prepared.facts()
    assert facts["flops_of_the_parent"] == 3 * (4 * full[0] + 6 * full[1])
    taught = facts["flops_of_the_parent"] / 3 if distill else 0  # the backward pass costs two forward ones
    assert facts["flops"] == pytest.approx(3 * (4 * own[0] + 6 * own[1]) + taught, rel=1e-12)
    assert prepared.flops(128) == pytest.approx(own[1] + (full[1] / 3 if distill else 0), rel=1e-12)


def test_a_curriculum_counts_in_steps(recipe):
    prepared = prepare(recipe("data.lengths=[[0, 32], [3, 48]]", "training.batch=4"))
    lengths = [len(prepared.train.sequence(index).input_ids) for index in range(40)]
    assert lengths == [32] * 12 + [48] * 28
    assert {len(kind.sequence(0).input_ids) for kind in prepared.held_out.values()} == {48}


def documents(corpus):
    return {corpus.document(number).tobytes() for number in range(len(corpus))}


def test_what_is_held_out_is_not_trained_on(recipe, place):
    for seed in range(3):
        prepared = prepare(recipe("data.held_out=0.3", f"training.seed={seed}"))
        training, aside = documents(prepared.corpus), documents(prepared.aside)
        assert (len(training), len(aside)) == (14, 6)
        assert not training & aside
        assert prepared.train.corpus is prepared.corpus
        assert prepared.held_out["documents"].corpus is prepared.aside
    other = prepare(recipe(f"data.held_out={place / 'others.jsonl'}"))
    assert documents(other.corpus) == training | aside
    assert len(documents(other.aside) - training - aside) == len(other.aside) == 3


def test_recall_items_have_their_share_and_hide_in_the_same_side(recipe):
    prepared = prepare(recipe("data.recall={share: 0.25, loss_on: all}", "data.lengths=512", "training.steps=2000"))
    read = prepared.facts()["read"]
    assert read["recall_sequences"] + read["documents_sequences"] == 4000
    assert read["recall_sequences"] / 4000 == pytest.approx(0.25, abs=0.03)
    items, asked = prepared.train.parts["recall"], prepared.held_out["recall"]
    assert (items.corpus, items.loss_on) == (prepared.corpus, "all")
    assert (asked.corpus, asked.loss_on) == (prepared.aside, "answer")
    assert prepare(recipe()).held_out.keys() == {"documents"}


def test_a_tokenizer_of_another_model_is_refused(recipe, place, tmp_path):
    small = copied(place / "model", tmp_path / "small", vocab_size=100)
    with pytest.raises(InputError, match=r"the tokenizer gives token \d+, the model has 100: they do not fit"):
        prepare(recipe(f"model={small}"))


def test_sequences_end_where_the_positions_end(recipe, place):
    assert max_positions(prepare(recipe(f"data.lengths={POSITIONS}")).config) == POSITIONS
    longer = f"data.lengths=[[0, 32], [5, {POSITIONS + 1}]]"
    words = rf"1,025 tokens are more than the model's 1,024 positions: .*positions=\{{length: {POSITIONS + 1}, method:"
    with pytest.raises(InputError, match=words):
        prepare(recipe(longer))
    prepared = prepare(recipe(longer, f"positions={{length: {2 * POSITIONS}, method: theta}}"))
    assert max_positions(prepared.config) == 2 * POSITIONS
    assert len(prepared.train.sequence(10).input_ids) == POSITIONS + 1
    with pytest.raises(InputError, match="2,049 tokens are more than the model's 2,048 positions"):
        prepare(recipe("data.lengths=2049", f"positions={{length: {2 * POSITIONS}, method: theta}}"))
    with pytest.raises(InputError, match="unknown method 'beta'"):
        prepare(recipe(f"positions={{length: {2 * POSITIONS}, method: beta}}"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("plan=full*3", "the plan has 3 layers, the model has 4"),
        ("plan={layout: nope}", "unknown layout 'nope': choose one of full"),
        ("data.held_out=20", "cannot hold out 20 of 20 documents: both sides need at least one"),
        ("data.documents=none.jsonl", "cannot read none.jsonl"),
        ("model=./none", r"\./none is not a folder"),
        ("data.recall={share: 0.5}", "recall items need at least 512 tokens"),
    ],
)
def test_what_the_model_or_the_data_do_not_allow_is_refused(recipe, change, words):
    with pytest.raises((InputError, PlanError), match=words):
        prepare(recipe(change))
    assert not Path(recipe().output).exists()


def test_a_run_is_known_again_wherever_it_lies(recipe, place, tmp_path):
    identity = prepare(recipe()).identity
    assert json.loads(json.dumps(identity)) == identity
    moved = copied(place / "model", tmp_path / "moved", dtype="bfloat16", transformers_version="5.0.0")
    texts = shutil.copy(place / "texts.jsonl", tmp_path / "moved.jsonl")
    elsewhere = [f"model={moved}", f"data.documents={texts}", f"data.cache={tmp_path / 'cache'}", "output=elsewhere"]
    for same in (elsewhere, ["saving.every=3"], ["data.held_out=1"]):  # 1 of 20 is the default's part of them
        assert prepare(recipe(*same)).identity == identity


def test_another_run_is_told_from_this_one(recipe, place, tmp_path):
    thinner = copied(place / "model", tmp_path / "thinner", intermediate_size=32)
    texts = write_documents(tmp_path / "texts.jsonl", [*range(19), 20])
    runs = [
        [],
        [f"data.documents={texts}"],
        ["data.held_out=2"],
        [f"data.held_out={place / 'others.jsonl'}"],
        ["plan=full*3,window:16:sinks=2"],
        [f"model={thinner}"],
        [f"positions={{length: {2 * POSITIONS}, method: theta}}"],
        ["training.seed=1"],
        ["training.batch=1"],
        ["data.lengths=65"],
    ]
    marks = [json.dumps(prepare(recipe(*changes)).identity, sort_keys=True) for changes in runs]
    assert len(set(marks)) == len(runs)


def test_a_converted_model_brings_its_plan_and_counts_against_its_parent(recipe, place, tmp_path):
    identities = []
    for plan in ("window:8*4", "window:9*4"):
        folder = tmp_path / plan
        convert(load(str(place / "model")), SpanPlan.parse(plan)).save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
        prepared = prepare(recipe(f"model={folder}", "plan="))
        assert (str(prepared.plan), str(prepared.parent)) == (plan, "full*4")
        identities.append(prepared.identity)
    assert identities[0] != identities[1]


# whether it fits


@pytest.fixture
def bytes_free(monkeypatch):
    """Says how much memory and disk are free."""

    def free(memory, disk):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=disk))
        return asked

    asked = []
    return free


def test_too_little_memory_is_refused(recipe, bytes_free):
    prepared = prepare(recipe())
    need = prepared.sizes()["memory"]
    bytes_free(need, 10**12)
    prepared.refuse_too_large()
    bytes_free(need - 1, 10**12)
    words = f"needs about {need / 1e9:.1f} GB of memory and .* training.recompute=true.*micro_batch.*data.lengths.*lora"
    with pytest.raises(ResourceError, match=words):
        prepared.refuse_too_large()


def test_too_little_disk_is_refused(recipe, place, bytes_free):
    prepared = prepare(recipe(f"output={place / 'a' / 'b'}", "saving.keep=3", f"model={place / 'wide'}"))
    weights = sum(weight.numel() for weight in load(str(place / "wide")).parameters())
    need = 4 * 3 * weights * 4  # float32: the weights and two moments; those that are kept and the one being written
    asked = bytes_free(10**12, need)
    prepared.refuse_too_large()
    assert asked == [place]
    bytes_free(10**12, need - 1)
    words = f"need {need / 1e9:.1f} GB of disk at {place} and .* free: lower saving.keep, or name another output"
    with pytest.raises(ResourceError, match=words):
        prepared.refuse_too_large()
    assert not (place / "a").exists()


def test_adapters_and_a_teacher_change_what_is_needed(recipe, place):
    whole, adapters, taught, halved = (
        prepare(recipe(f"model={place / 'wide'}", "data.lengths=256", *change)).sizes()
        for change in ([], ["training.lora={}"], ["training.distill=0.5"], ["training.precision=bf16"])
    )
    weights = sum(weight.numel() for weight in load(str(place / "wide")).parameters())
    assert whole["checkpoint"] == 12 * weights
    assert adapters["checkpoint"] < whole["checkpoint"] / 2
    assert adapters["memory"] < whole["memory"]
    assert taught["memory"] == whole["memory"] + 4 * weights
    assert halved["memory"] < whole["memory"]


def kept_for_backward(model, ids):
    """Bytes of everything but the weights that a forward pass keeps for the backward pass."""
    own = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("plan", ["full*4", "window:64*4", "block:64:lookback=1*4"])
def test_the_memory_that_grows_with_the_tokens_is_about_what_is_kept(recipe, place, plan):
    """As much as is kept, or up to half more: an estimate that refuses a run must not be far off on either side."""
    ids = torch.zeros(1, 512, dtype=torch.long)
    model = convert(load(str(place / "wide")), SpanPlan.parse(plan), check=False).train()
    kept = kept_for_backward(model, ids)
    model.activation_checkpointing_enable()
    between = kept_for_backward(model, ids)
    for recompute, real in ((False, kept), (True, between + kept / LAYERS)):
        changes = [f"model={place / 'wide'}", f"plan={plan}", "data.lengths=512", f"training.recompute={recompute}"]
        one, two = (
            prepare(recipe(*changes, f"training.micro_batch={sequences}")).sizes()["memory"] for sequences in (1, 2)
        )
        assert real <= two - one <= 1.5 * real


def test_a_recipe_from_python_is_as_good(recipe):
    made = Recipe.model_validate(recipe().model_dump())
    assert prepare(made).identity == prepare(recipe()).identity
