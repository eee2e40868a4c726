import errno
import os

import pytest

from madad._runtime.files import read_json, whole_file, write_json


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as scratch:
        scratch.write_text("new")
        assert scratch.parent == tmp_path and not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError, match="mine"), whole_file(path) as scratch:
        scratch.write_text("half")
        raise KeyError("mine")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_operating_systems_error_keeps_its_kind_and_names_the_file(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(PermissionError, match=r"got .*a\.txt.*Permission denied.*free space") as raised:
        with whole_file(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert raised.value.errno == errno.EACCES
    with (
        pytest.raises(FileNotFoundError, match="Create the folder"),
        whole_file(tmp_path / "no" / "b") as one,
    ):
        one.write_text("x")


def test_json_comes_back_as_it_was_written(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "a.json must exist, got no such file. Fetch it."),
        ("{", ValueError, "a.json must be JSON, got a damaged file .*. Fetch it."),
        ("[" * 100_000, ValueError, "a.json must be JSON, got a damaged file .*. Fetch it."),
        ("[]", ValueError, "a.json must hold a JSON object, got list. Fetch it."),
    ],
    ids=["missing", "damaged", "deep", "list"],
)
def test_json_that_cannot_be_read_is_named_with_a_remedy(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(error, match=message):
        read_json(tmp_path / "a.json", "Fetch it.")
