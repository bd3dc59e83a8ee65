import itertools
import sys

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from masformer.data.documents import Document, Source, iter_documents, read_documents
from masformer.errors import InputError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_one_document_named_after_it(tmp_path):
    path = write(tmp_path / "notes.txt", b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_documents(path) == [Document("notes", "one\ntwo\n")]


def test_a_jsonl_file_takes_ids_or_counts_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"id": "x", "text": "één"}\n\n{"text": "two"}\n{"id": 7, "text": "three"}')
    assert read_documents(str(path)) == [Document("x", "één"), Document("a.jsonl:3", "two"), Document("7", "three")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.TXT", "bee")
    write(tmp_path / "a.jsonl", '{"id": "1", "text": "one"}\n{"id": "2", "text": "two"}\n')
    write(tmp_path / "picture.png", b"\x89PNG")
    write(tmp_path / "._b.txt", b"\xff")
    (tmp_path / "sub.txt").mkdir()
    assert [document.id for document in read_documents(tmp_path)] == ["1", "2", "b"]


def test_the_limit_leaves_the_rest_unread(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    assert [document.text for document in read_documents(tmp_path, limit=2)] == ["one", "two"]
    with pytest.raises(InputError, match="line 3"):
        read_documents(tmp_path, limit=3)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(InputError, match=f"at least 1, got {limit}"):
        read_documents(write(tmp_path / "a.txt", "a"), limit=limit)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", r"document 'a' is empty \(.*a\.txt\)"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8: byte 3 is 0xe9"),
        ("a.jsonl", '{"text": "a"}\n{"id": "x", "text": ""}', r"document 'x' is empty \(.*a.jsonl, line 2\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2 is not UTF-8: byte 10 is 0xff"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", '["text"]', 'a.jsonl, line 1 has no string "text"'),
        ("a.jsonl", '{"body": "a"}', 'line 1 has no string "text"'),
        ("a.jsonl", '{"text": 3}', 'line 1 has no string "text"'),
        ("a.jsonl", '{"id": [], "text": "a"}', r'line 1 has an "id" that is neither a string nor a number: \[\]'),
        ("a.jsonl", '{"text": "a\\ud83d"}', "half a surrogate pair at 1"),
        ("a.jsonl", "\n\n", "holds no documents"),
        ("a.pdf", b"%PDF", "is not .txt, .jsonl or .parquet, nor a folder"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_documents(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing", "missing.pdf"])
def test_a_missing_file_says_so(tmp_path, name):
    with pytest.raises(InputError, match=rf"cannot read .*{name}: No such file"):
        read_documents(tmp_path / name)


def test_a_folder_without_documents_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no documents"):
        read_documents(tmp_path)


def write_parquet(path, columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_parquet_file_takes_ids_or_counts_rows(tmp_path):
    named = write_parquet(tmp_path / "a.parquet", {"id": ["x", None], "text": ["één", "two"], "more": [1, 2]})
    assert read_documents(named) == [Document("x", "één"), Document("a.parquet:2", "two")]
    numbered = write_parquet(tmp_path / "b.PARQUET", {"text": [str(number) for number in range(40)]})
    assert [document.id for document in read_documents(numbered)][38:] == ["b.PARQUET:39", "b.PARQUET:40"]


def test_a_folder_may_mix_all_kinds(tmp_path):
    write_parquet(tmp_path / "b.parquet", {"text": ["two", "three"]})
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "c.jsonl", '{"text": "four"}')
    assert [document.text for document in read_documents(tmp_path)] == ["one", "two", "three", "four"]
    assert [document.text for document in read_documents(Source(tmp_path, limit=2))] == ["one", "two"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, 'a.parquet, row 1 has no string "text"'),
        ({"text": ["a", None]}, 'a.parquet, row 2 has no string "text"'),
        ({"text": [b"a"]}, 'a.parquet, row 1 has no string "text"'),
        ({"text": ["a", " "]}, r"document 'a.parquet:2' is empty \(.*row 2\)"),
        ({"text": ["a"], "id": [[1]]}, r"neither a string nor a number: \[1\]"),
        ({"text": pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)}, "cannot be read as parquet .*decode"),
        ({"text": pyarrow.array([], pyarrow.string())}, "holds no documents"),
    ],
)
def test_a_bad_row_is_named(tmp_path, columns, message):
    with pytest.raises(InputError, match=message) as caught:
        read_documents(write_parquet(tmp_path / "a.parquet", columns))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 4, 20, -9, -1])
def test_a_torn_parquet_file_says_so(tmp_path, cut):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read as parquet") as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)


def test_documents_come_one_by_one(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\nnot JSON\n')
    documents = iter_documents(path)
    assert next(documents).text == "one"
    with pytest.raises(InputError, match="line 2 is not JSON"):
        next(documents)


def test_empty_documents_are_handed_out_where_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": "two"}\n')
    assert [document.text for document in iter_documents(path, allow_empty=True)] == ["", "two"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`owner/name` is a local folder, loaded by datasets itself; returns the calls that datasets saw."""
    (tmp_path / "name").mkdir()
    write_parquet(tmp_path / "name" / "train-0.parquet", {"text": ["one", "two"], "id": ["a", "b"]})
    write_parquet(tmp_path / "name" / "test-0.parquet", {"text": ["three"], "id": ["c"]})
    load, calls = datasets.load_dataset, []

    def load_local(path, name=None, **options):
        calls.append((path, name, dict(options)))
        options.pop("revision")
        return load(str(tmp_path / "name"), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    datasets.disable_progress_bars()
    return calls


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_id_is_read_through_datasets(hub, streaming):
    source = Source("owner/name", streaming=streaming, config="en", revision="abc")
    assert read_documents(source) == [Document("a", "one"), Document("b", "two")]
    assert hub == [("owner/name", "en", {"split": "train", "revision": "abc", "streaming": streaming})]
    test = Source("owner/name", split="test", limit=1, streaming=streaming)
    assert read_documents(test) == [Document("c", "three")]


def test_a_hub_id_without_that_split_is_one_line(hub):
    with pytest.raises(InputError, match=r"cannot load the data set owner/name from the hub.*validation") as caught:
        read_documents(Source("owner/name", split="validation"))
    assert "\n" not in str(caught.value)


def test_a_stream_that_breaks_is_one_line(monkeypatch):
    def load(*_, **__):
        yield {"text": "one"}
        raise KeyError("a\nb")

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = iter_documents("owner/name")
    assert next(documents) == Document("owner/name:1", "one")
    with pytest.raises(InputError, match="cannot load the data set owner/name from the hub"):
        next(documents)
    assert len(list(itertools.islice(iter_documents(Source("owner/name", limit=1)), 5))) == 1


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_id_without_network_is_one_line(streaming):
    with pytest.raises(InputError, match=r"data set owner/name from the hub, and no file .*Couldn't reach") as caught:
        read_documents(Source("owner/name", streaming=streaming))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "package"), [("datasets", "owner/name"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(InputError, match=rf"{package}.*pip install 'masformer\[train\]'"):
        read_documents(package)


def test_what_lies_on_the_disk_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    write(tmp_path / "owner" / "name" / "a.txt", "here")
    assert read_documents("owner/name") == [Document("a", "here")]  # datasets would find it too, as owner/name:1
    for missing in ("owner/name.txt", "owner/a/b", "/owner/name", "name", tmp_path / "x" / "y"):
        with pytest.raises(InputError, match="No such file"):
            read_documents(missing)
