import errno
import os

import pytest

from madad._runtime.files import whole_file


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
