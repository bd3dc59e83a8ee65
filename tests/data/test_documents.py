import pytest

from masformer.data.documents import Document, read_documents
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
        ("a.jsonl", '["text"]', 'a.jsonl, line 1 is not a JSON object with a string "text"'),
        ("a.jsonl", '{"body": "a"}', 'line 1 is not a JSON object with a string "text"'),
        ("a.jsonl", '{"text": 3}', 'line 1 is not a JSON object with a string "text"'),
        ("a.jsonl", '{"id": [], "text": "a"}', r'line 1 has an "id" that is neither a string nor a number: \[\]'),
        ("a.jsonl", '{"text": "a\\ud83d"}', "half a surrogate pair at 1"),
        ("a.jsonl", "\n\n", "holds no documents"),
        ("a.pdf", b"%PDF", "is neither .txt nor .jsonl nor a folder"),
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
