"""What a recipe may say, how it is refused, and which part of it decides what comes out of a run."""

import re
from pathlib import Path

import pytest
import yaml

from masformer.errors import InputError
from masformer.spans import Full, PlanError, SpanPlan, Window
from masformer.training.recipe import Recipe, keys, read_recipe

ROOT = Path(__file__).parents[2]
LEAST = """
model: models/parent
output: runs/one
data: {documents: speeches.jsonl}
training: {steps: 4}
"""
FULL = """
model: models/parent
output: runs/one
plan: {layout: masformer, full: 2, placement: top, local: "window:8"}
positions: {length: 64, method: theta}
data: {documents: {id: a/b}, held_out: {id: c/d}, lengths: 32, recall: {share: 0.5}}
training: {steps: 4, lora: {}}
"""
DECISIVE = {
    "positions.length": "128",
    "positions.method": "yarn",
    "data.mode": "single",
    "data.lengths": "[[0, 32], [2, 64]]",
    "data.end_token": "false",
    "data.recall.share": "0.25",
    "data.recall.loss_on": "answer",
    "training.steps": "5",
    "training.batch": "2",
    "training.learning_rate": "2e-4",
    "training.schedule": "linear",
    "training.warmup_steps": "1",
    "training.weight_decay": "0.1",
    "training.betas": "[0.9, 0.999]",
    "training.max_gradient_norm": "2.0",
    "training.precision": "bf16",
    "training.lora.rank": "8",
    "training.lora.alpha": "8",
    "training.lora.dropout": "0.1",
    "training.lora.embeddings": "true",
    "training.lora.norms": "true",
    "training.distill": "0.5",
    "training.seed": "1",
}
NOT_DECISIVE = {
    "plan": "full*4",  # nor the notation of a plan: the plan itself is told apart beside the recipe
    "plan.layout": "local",
    "plan.full": "[0, 3]",
    "plan.placement": "bottom",
    "plan.local": "window:9",
    "model": "elsewhere/parent",
    "output": "runs/two",
    "data.documents": "others.txt",
    "data.documents.id": "e/f",
    "data.documents.config": "en",
    "data.documents.split": "test",
    "data.documents.revision": "v1",
    "data.documents.streaming": "false",
    "data.documents.limit": "3",
    "data.held_out": "5",
    "data.held_out.id": "e/f",
    "data.held_out.config": "en",
    "data.held_out.split": "test",
    "data.held_out.revision": "v1",
    "data.held_out.streaming": "false",
    "data.held_out.limit": "3",
    "data.cache": "cache",
    "training.micro_batch": "2",
    "training.recompute": "true",
    "training.gradient_limit": "5",
    "evaluation.every": "7",
    "evaluation.sequences": "7",
    "saving.every": "7",
    "saving.keep": "7",
    "logging.every": "7",
    "logging.to": "[tensorboard]",
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(LEAST)
    return path


@pytest.fixture
def full(tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text(FULL)
    return path


def refusal(file, *changes):
    with pytest.raises(InputError) as caught:
        read_recipe(file, changes)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("text", [LEAST, FULL])
def test_a_recipe_comes_back_from_json_and_yaml(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    recipe = read_recipe(file)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert read_recipe(file) == recipe


def test_what_is_left_out_has_its_default(file):
    recipe = read_recipe(file)
    assert (recipe.plan, recipe.positions, recipe.data.recall, recipe.training.lora) == (None, None, None, None)
    assert (recipe.data.held_out, recipe.data.lengths, recipe.data.mode, recipe.data.end_token) == (
        0.05,
        2048,
        "packed",
        True,
    )
    assert (recipe.training.batch, recipe.training.learning_rate, recipe.training.betas) == (1, 1e-4, (0.9, 0.95))
    assert (recipe.evaluation.every, recipe.saving.every, recipe.saving.keep, recipe.logging.to) == (100, 50, 2, [])


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_the_recipes_of_the_project_can_be_read(file):
    assert read_recipe(file).output.startswith("runs/")


def test_the_guide_shows_a_whole_recipe(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    assert read_recipe(file).data.lengths == [[0, 2048], [500, 8192]]


def test_changes_are_values_in_yaml_and_make_what_is_missing(file, full):
    changes = [
        "training.steps=20",
        "output=runs/short",
        "training.lora={}",
        "training.lora.rank=4",
        "data.recall={share: 0.1}",
        "saving.keep=1",
        "training.learning_rate=1e-4",
        "training.learning_rate=3E-5",
    ]
    recipe = read_recipe(file, changes)
    assert (recipe.training.steps, recipe.output, recipe.saving.keep) == (20, "runs/short", 1)
    assert (recipe.training.lora.rank, recipe.training.lora.alpha) == (4, 32)
    assert (recipe.data.recall.share, recipe.data.recall.loss_on) == (0.1, "all")
    assert recipe.training.learning_rate == 3e-5  # the last one holds
    assert read_recipe(full, ["training.lora=", "plan=full*4"]).training.lora is None
    assert read_recipe(full, ["training.lora=", "training.lora.rank=4"]).training.lora.rank == 4
    assert read_recipe(file) == read_recipe(file, ["training.steps=4"])


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "+.1e-3", "0.0001", "1.e-4"])
def test_numbers_are_those_of_yaml_1_2(file, number):
    for key in ("training.learning_rate", "training.weight_decay", "training.distill", "data.held_out"):
        part, name = key.split(".")
        assert getattr(getattr(read_recipe(file, [f"{key}={number}"]), part), name) == 1e-4


def test_home_is_meant_by_a_tilde(file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = read_recipe(file, ["output=~/run", "model=~/model", "data.documents=~/texts", "data.cache=~/cache"])
    assert {recipe.output, recipe.model, recipe.data.documents, recipe.data.cache} == {
        str(tmp_path / name) for name in ("run", "model", "texts", "cache")
    }


HELD_OUT = "data.held_out: write a number of documents (1 or more), or which part of them (between 0 and 1)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mdoel=x", "unknown key mdoel: did you mean model?"),
        ("training.step=3", "unknown key training.step: did you mean training.steps?"),
        ("data.learning_rate=3", "unknown key data.learning_rate: did you mean training.learning_rate?"),
        ("data.documents={idd: a}", "unknown key data.documents.idd: did you mean data.documents.id?"),
        ("qqq.zzz=3", "unknown key qqq"),
        ("data.documents={}", "the key data.documents.id is missing"),
        ("plan={full: 3}", "the key plan.layout is missing"),
        ("positions={length: 10}", "the key positions.method is missing"),
        ("training.betas=[0.9]", "the number training.betas.1 is missing"),
        ("output=", "output should be a text (got None)"),
        ("output=''", "output should have at least 1 character (got '')"),
        ("output=2024-12-01", "output should be a text (got datetime.date(2024, 12, 1))"),
        ("data.documents=3", "data.documents should be a text or keys and values (got 3)"),
        ("data.documents={id: a, limit: 0}", "data.documents.limit should be greater than or equal to 1 (got 0)"),
        ("data.held_out=0", f"{HELD_OUT} (got 0)"),
        ("data.held_out=-1", f"{HELD_OUT} (got -1)"),
        ("data.held_out=1.5", f"{HELD_OUT} (got 1.5)"),
        ("data.held_out=0.0", f"{HELD_OUT} (got 0.0)"),
        ("data.held_out=.nan", f"{HELD_OUT} (got nan)"),
        ("data.held_out=true", "data.held_out should be a text or keys and values or a whole number or a number (got"),
        ("data.mode=pack", "data.mode should be 'packed' or 'single' (got 'pack')"),
        ("data.end_token=1", "data.end_token should be true or false (got 1)"),
        ("data.lengths=1", "data.lengths: a sequence needs at least 2 tokens, got the lengths [1]"),
        ("data.lengths=0", "data.lengths should be greater than or equal to 1 (got 0)"),
        ("data.lengths=big", "data.lengths should be a whole number or a list (got 'big')"),
        ("data.lengths=[]", "data.lengths: the first indices of a length curriculum ascend from 0, got []"),
        ("data.lengths=[[1, 8]]", "data.lengths: the first indices of a length curriculum ascend from 0, got [1]"),
        ("data.lengths=[[0, 8], [0, 9]]", "data.lengths: the first indices of a length curriculum ascend from 0"),
        ("data.lengths=[[0, 8], [5]]", "data.lengths: a stage of a curriculum is [first step, tokens] (got [[0, 8]"),
        ("data.lengths=[[0, 8], [5, x]]", "data.lengths.1.1 should be a whole number (got 'x')"),
        ("data.recall={share: 1}", "data.recall.share should be less than 1 (got 1)"),
        ("data.recall=0.1", "data.recall should be keys and values (got 0.1)"),
        ("plan=full*2,blok:4", "plan: unknown span 'blok:4': a span is one of full, block:SIZE, window:SIZE"),
        ("plan={layout: local, local: blok}", "plan: unknown span 'blok'"),
        ("plan={layout: masformer, full: [0, x]}", "plan.full.1 should be a whole number (got 'x')"),
        ("plan=[full]", "plan should be a text or keys and values (got ['full'])"),
        ("positions={length: 0, method: theta}", "positions.length should be greater than or equal to 1 (got 0)"),
        ("training.steps=", "training.steps should be a whole number (got None)"),
        ("training.steps=1.5", "training.steps should be a whole number (got 1.5)"),
        ("training.steps=true", "training.steps should be a whole number (got True)"),
        ("training.steps=0", "training.steps should be greater than or equal to 1 (got 0)"),
        ("training.batch=-2", "training.batch should be greater than or equal to 1 (got -2)"),
        ("training.seed=-1", "training.seed should be greater than or equal to 0 (got -1)"),
        ("training.micro_batch=2", "training.batch 1 is no multiple of training.micro_batch 2"),
        ("training.learning_rate=0", "training.learning_rate should be greater than 0 (got 0)"),
        ("training.learning_rate=-1e-4", "training.learning_rate should be greater than 0 (got -0.0001)"),
        ("training.learning_rate=.inf", "training.learning_rate should be a finite number (got inf)"),
        ("training.learning_rate='1e-4'", "training.learning_rate should be a number (got '1e-4')"),
        ("training.learning_rate=true", "training.learning_rate should be a number (got True)"),
        ("training.betas=[0.9, 1.0]", "training.betas.1 should be less than 1 (got 1.0)"),
        ("training.distill=.nan", "training.distill should be less than or equal to 1 (got nan)"),
        ("training.precision=fp16", "training.precision should be 'fp32' or 'bf16' (got 'fp16')"),
        ("training.lora=4", "training.lora should be keys and values (got 4)"),
        ("training.lora.rank=0", "training.lora.rank should be greater than or equal to 1 (got 0)"),
        ("training=3", "training should be keys and values (got 3)"),
        ("evaluation.every=0", "evaluation.every should be greater than or equal to 1 (got 0)"),
        ("saving.keep=0", "saving.keep should be greater than or equal to 1 (got 0)"),
        ("logging.to=wandb", "logging.to should be a list (got 'wandb')"),
        ("logging.to=[paper]", "logging.to.0 should be 'tensorboard', 'trackio', 'wandb' or 'mlflow' (got 'paper')"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(file, change, words):
    assert refusal(file, change).startswith(f"{file}: {words}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("=3", "cannot read the change '=3': write for example training.steps=20"),
        ("a..b=3", "cannot read the change 'a..b=3': write for example training.steps=20"),
        ("training.steps", "cannot read the change 'training.steps': write for example training.steps=20"),
        ("model.x=3", "the change 'model.x=3' goes into model, which has no keys"),
        ("training.steps.x=3", "the change 'training.steps.x=3' goes into steps, which has no keys"),
        ("training.steps=[", "cannot read the value of the change 'training.steps=[' as YAML"),
        ("output=2024-13-45", "cannot read the value of the change 'output=2024-13-45' as YAML"),
    ],
)
def test_a_change_that_cannot_be_read_is_refused(file, change, words):
    assert refusal(file, change) == words


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no recipe: write keys and values"),
        (b"- model\n- output\n", "holds no recipe: write keys and values"),
        (b"a text", "holds no recipe: write keys and values"),
        (b"model: [", "as YAML: while parsing a flow node"),
        (b"model: \xff\n", "as YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"output: 2024-13-45\n", "as YAML: month must be in 1..12"),
        (b"model: !!python/object:os.system {}\n", "as YAML: could not determine a constructor"),
        (LEAST.encode() + b"model: other\n", "as YAML: the key model stands twice in one place"),
        (LEAST.replace("steps: 4", "steps: 4, steps: 5").encode(), "as YAML: the key steps stands twice in one place"),
        (b"training: {steps: 1}\n", "the key model is missing"),
        (LEAST.encode() + b"1: 2\n", "unknown key 1"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(file, content, words):
    file.write_bytes(content)
    line = refusal(file)
    assert str(file) in line
    assert words in line


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"cannot read {tmp_path / 'none.yaml'}: No such file or directory"
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory"


def test_the_plan_is_made_when_the_layers_are_known(file):
    own = SpanPlan((Full(),) * 4)
    assert read_recipe(file).plan_for(4, own) is own
    assert str(read_recipe(file, ["plan=full*2,block:8*2"]).plan_for(4, own)) == "full*2,block:8*2"
    made = read_recipe(file, ["plan={layout: masformer, full: [1], local: 'window:8:sinks=2'}"]).plan_for(3, own)
    assert made.spans == (Window(8, sinks=2), Full(), Window(8, sinks=2))
    with pytest.raises(PlanError, match="unknown layout 'nope': choose one of full, local"):
        read_recipe(file, ["plan={layout: nope}"]).plan_for(4, own)
    with pytest.raises(PlanError, match="full layer 9 is out of range"):
        read_recipe(file, ["plan={layout: masformer, full: [9]}"]).plan_for(4, own)


def test_every_key_is_decisive_or_not():
    tried = DECISIVE.keys() | NOT_DECISIVE.keys()
    parts = {key.rpartition(".")[0] for key in keys()}
    assert not DECISIVE.keys() & NOT_DECISIVE.keys()
    assert set(keys()) - parts <= tried
    assert tried <= set(keys())


@pytest.mark.parametrize(("key", "value"), [*DECISIVE.items(), *NOT_DECISIVE.items()])
def test_what_decides_the_weights_is_told_from_what_does_not(full, key, value):
    before = ["training.batch=2"] if key == "training.micro_batch" else []
    was, now = read_recipe(full, before), read_recipe(full, [*before, f"{key}={value}"])
    assert now != was
    assert (now.decisive() != was.decisive()) == (key in DECISIVE)
