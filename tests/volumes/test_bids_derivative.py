import csv
import errno
import json
import os
import threading
from pathlib import Path

import pytest

from madad._runtime.files import read_json, write_json, write_text
from madad.datasets import Scan
from madad.volumes.bids_derivative import DESCRIPTION, ERROR_COLUMNS, ERRORS, Derivative, changes, table_text

ONE = Scan("01", {"T1": Path("t1.nii.gz")})
VISIT = Scan("02", {"T1": Path("t1.nii.gz")}, session="b")


@pytest.fixture
def source(tmp_path):
    """A folder of scans whose name a URL has to escape."""
    folder = tmp_path / "raw data, 100 % #1?"
    folder.mkdir()
    return folder


@pytest.fixture
def start(tmp_path, source):
    """``start(**changed)``: a derivative of the source that is ready to be written to."""

    def started(root=tmp_path / "out", **changed):
        folder = Derivative(root)
        defaults = {"name": "Maps", "step": "predict", "parameters": {"threshold": 0.5, "range": (1, 2)}}
        folder.start(**({"source": source} | defaults | changed))
        return folder

    return started


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def rows_of(path):
    """A table as BIDS has them: no quotes, tabs between cells."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


# Names


def test_a_source_comes_back_from_its_uri(start, source):
    folder = start()
    path = source / "sub-01" / "anat" / "über 50 %.nii.gz"
    uri = folder.source_uri(path)
    assert uri == "bids:raw:sub-01/anat/über 50 %.nii.gz"
    assert folder.source_path(uri) == path
    assert Derivative(folder.root).source_path(uri) == path


def test_relative_sources_are_those_of_the_working_directory(start, source, monkeypatch):
    monkeypatch.chdir(source.parent)
    folder = start(source=source.name, root="out")
    assert folder.source_uri(Path(source.name, "a.nii")) == "bids:raw:a.nii"
    monkeypatch.chdir(source)
    assert Derivative(source.parent / "out").source_path("bids:raw:a.nii") == source / "a.nii"


@pytest.mark.parametrize(
    ("scan", "space", "entity", "name"),
    [
        (ONE, None, "", "sub-01/anat/sub-01_mask.nii.gz"),
        (ONE, "MNI", "", "sub-01/anat/sub-01_space-MNI_mask.nii.gz"),
        (VISIT, None, "ce-gadolinium", "sub-02/ses-b/anat/sub-02_ses-b_ce-gadolinium_mask.nii.gz"),
        (VISIT, "MNI", "ce-1", "sub-02/ses-b/anat/sub-02_ses-b_ce-1_space-MNI_mask.nii.gz"),
    ],
)
def test_names(scan, space, entity, name):
    assert Derivative("out").path(scan, "mask.nii.gz", space, entity=entity) == Path("out", name)


# The folder


def test_the_description_says_what_made_it_from_what(start, source):
    folder = start()
    description = folder.description()
    assert description["DatasetType"] == "derivative" and description["Name"] == "Maps"
    assert description["GeneratedBy"][0]["Description"] == "madad predict"
    assert description["DatasetLinks"] == {"raw": source.as_uri()}
    assert description["madad"] == {"step": "predict", "parameters": {"threshold": 0.5, "range": [1, 2]}}
    assert "research use only" in (folder.root / "README.md").read_text()
    assert "/*.tsv" in (folder.root / ".bidsignore").read_text().split("\n")


def test_starting_again_changes_nothing(start):
    folder = start()
    folder.clear(ONE)
    write_json(folder.path(ONE, "map.json"), {})
    before = files(folder.root)
    start()
    start(overwrite=True)
    assert files(folder.root) == before


def test_an_empty_folder_and_one_with_hidden_files_are_free(start, tmp_path):
    (tmp_path / "empty").mkdir()
    start(root=tmp_path / "empty")
    (tmp_path / "git" / ".git").mkdir(parents=True)
    start(root=tmp_path / "git")


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_things_are_refused(start, tmp_path, overwrite):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    (tmp_path / "raw").mkdir()
    write_json(tmp_path / "raw" / DESCRIPTION, {"Name": "raw", "BIDSVersion": "1.10.0"})
    start(root=tmp_path / "prepared", step="preprocess")
    before = files(tmp_path)
    for name in ("file", "thesis", "raw", "prepared"):
        message = f"OUT must be new, empty or results of madad predict, got .*{name}, which holds something"
        with pytest.raises(FileExistsError, match=message):
            start(root=tmp_path / name, overwrite=overwrite)
    assert files(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_results_of_other_scans_are_refused(start, tmp_path, source, overwrite):
    start()
    with pytest.raises(
        FileExistsError, match="OUT must hold results of the same IN, got .*out with"
    ) as error:
        start(source=tmp_path, overwrite=overwrite)
    assert source.as_uri() in str(error.value)


def test_results_with_other_parameters_are_refused_and_say_which(start):
    start()
    message = r"OUT must hold results of the same parameters, got .*out with threshold 0.5, not 0.7. .*--over"
    with pytest.raises(FileExistsError, match=message):
        start(parameters={"threshold": 0.7, "range": (1, 2)})


def test_taken_over_it_holds_no_results_with_the_other_parameters(start):
    folder = start()
    for scan in (ONE, VISIT):
        folder.clear(scan)
        write_json(folder.path(scan, "map.json", "MNI"), {"threshold": 0.5})
        folder.fail(scan, ValueError("of before"))
    start(parameters={"threshold": 0.7}, overwrite=True)
    assert folder.description()["madad"]["parameters"] == {"threshold": 0.7}
    assert list(folder.sidecars("map.json")) == []
    folder.write_errors()
    assert rows_of(folder.root / ERRORS) == []
    start(parameters={"threshold": 0.7})


def test_a_damaged_description_is_named(start):
    folder = start()
    (folder.root / DESCRIPTION).write_text('{"madad": ')
    with pytest.raises(ValueError, match=f"{DESCRIPTION} must be JSON, got a damaged file"):
        start()


def test_changes():
    assert changes({"a": 1, "b": (1, 2)}, {"a": 1, "b": (1, 2)}) == "b (1, 2), not [1, 2]"
    assert changes({"a": 1, "b": 2}, {"b": 3, "c": "x"}) == "a 1, not None, b 2, not 3, c None, not 'x'"


def test_clear_removes_what_there_is_of_this_scan_alone(start):
    folder, other = start(), Scan("012", {})
    for scan in (ONE, VISIT, other):
        folder.clear(scan)
        path = folder.path(scan, "map.nii.gz")
        path.write_text("whole")
        path.with_name(f".{path.name}.1234.tmp").write_text("half")
        write_json(folder.path(scan, "map.json"), {})
    folder.clear(ONE)
    assert list(folder.path(ONE, "x").parent.iterdir()) == []
    folder.remove(VISIT)
    assert list(folder.path(VISIT, "x").parent.iterdir()) == []
    assert len(list(folder.path(other, "x").parent.iterdir())) == 3
    folder.remove(Scan("nobody", {}))
    assert not (folder.root / "sub-nobody").exists()


def test_what_is_removed_is_not_done_in_between(start, monkeypatch):
    folder, unlink, removed = start(), Path.unlink, []
    folder.clear(ONE)
    for name in ("a_map.nii.gz", "z_map.nii.gz", "m_map.json", "m_map.txt"):
        folder.path(ONE, name).write_text("")
    monkeypatch.setattr(
        Path, "unlink", lambda path, **how: removed.append(path.suffix) or unlink(path, **how)
    )
    folder.remove(ONE)
    assert removed[0] == ".json" and len(removed) == 4


def test_sidecars_come_by_path_and_hidden_ones_do_not(start):
    folder = start()
    for scan in (VISIT, ONE):
        folder.clear(scan)
        path = folder.path(scan, "map.json")
        write_json(path, {"subject": scan.subject})
        write_json(path.with_name(f".{path.name}"), {})
        write_json(folder.path(scan, "mask.json"), {})
    assert [content["subject"] for _, content in folder.sidecars("_map.json")] == ["01", "02"]
    folder.path(ONE, "map.json").write_text("[1]")
    with pytest.raises(ValueError, match="sub-01_map.json must hold a JSON object, got list"):
        list(folder.sidecars("_map.json"))


# Tables


def test_a_table_is_written_until_it_is_stable(start):
    folder, asked = start(), []

    def rows():  # another process adds to them meanwhile
        asked.append(len(asked))
        return [{"a": i, "b": "x"} for i in range(min(len(asked), 3))]

    folder.write_table("table.tsv", ("a", "b"), rows)
    assert (folder.root / "table.tsv").read_text() == "a\tb\n0\tx\n1\tx\n2\tx\n"
    assert len(asked) == 4
    written = (folder.root / "table.tsv").stat().st_mtime_ns
    folder.write_table("table.tsv", ("a", "b"), rows)
    assert (folder.root / "table.tsv").stat().st_mtime_ns == written


def test_cells():
    rows = [
        {"a": None, "b": "", "c": 1 / 3},
        {"a": "two\twords\nin a  cell", "b": True, "c": 3},
        {"a": 'say "x" \\ y', "c": 1e-12, "d": "no such column"},
        {"a": " \t\n"},
    ]
    text = table_text(("a", "b", "c"), rows)
    lines = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    assert lines[:3] == [
        ["a", "b", "c"],
        ["n/a", "n/a", "0.333333"],
        ["two words in a cell", "True", "3"],
    ]
    assert lines[3] == ['say "x" \\ y', "n/a", "1e-12"] and lines[4] == ["n/a", "n/a", "n/a"]
    assert [len(line) for line in lines] == [3] * 5


def test_a_failure_is_a_row_until_the_scan_succeeds(start):
    folder = start()
    folder.write_errors()
    assert (folder.root / ERRORS).read_text() == "\t".join(ERROR_COLUMNS) + "\n"
    folder.fail(VISIT, ValueError('no\tbrain\nin "C:\\it"'))
    folder.fail(ONE, OSError(errno.EACCES, "Permission denied", "t1.nii"))
    folder.write_errors()
    assert rows_of(folder.root / ERRORS) == [
        {
            "participant_id": "sub-01",
            "session_id": "n/a",
            "error": "PermissionError",
            "message": f"[Errno {errno.EACCES}] Permission denied: 't1.nii'",
        },
        {
            "participant_id": "sub-02",
            "session_id": "ses-b",
            "error": "ValueError",
            "message": 'no brain in "C:\\it"',
        },
    ]
    folder.fail(ONE, ValueError("something else"))
    folder.succeed(VISIT)
    folder.succeed(VISIT)
    folder.write_errors()
    (row,) = rows_of(folder.root / ERRORS)
    assert (row["participant_id"], row["message"]) == ("sub-01", "something else")


def test_processes_that_share_the_scans_leave_one_table(start):
    scans = [Scan(f"{i:02d}", {}) for i in range(24)]
    folder = start()

    def share(part):
        for scan in scans[part::4]:
            folder.fail(scan, ValueError(scan.subject))
        folder.write_errors()

    threads = [threading.Thread(target=share, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row["message"] for row in rows_of(folder.root / ERRORS)] == [scan.subject for scan in scans]


# Files


def test_json_and_text_come_back(tmp_path):
    content = {"a": [1, 2.5, None], "über": "x\n"}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    write_text(tmp_path / "a.txt", "one\r\ntwo\n")
    assert (tmp_path / "a.txt").read_bytes() == b"one\r\ntwo\n"
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "before")

    def fail(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        OSError, match=r"path must be in a folder that can be written to, got '.*a\.txt'"
    ) as e:
        write_text(tmp_path / "a.txt", "after")
    assert e.value.errno == errno.ENOSPC and "No space left" in str(e.value)
    assert files(tmp_path) == {"a.txt": b"before"}


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got '.*missing/a\.json'"):
        write_json(tmp_path / "missing" / "a.json", {})


@pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"\xff\xfe{}", b"[" * 99999])
def test_damaged_json_is_named(tmp_path, damage):
    (tmp_path / "a.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"a\.json must be JSON, got a damaged file"):
        read_json(tmp_path / "a.json")


def test_the_description_is_plain_json(start):
    assert json.loads((start().root / DESCRIPTION).read_text())["BIDSVersion"] == "1.10.0"
