"""What ``preprocess`` and ``predict`` have in common: kinds of input, shards, failures, interruptions."""

import argparse
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from madad.cli._cohort import (
    Tally,
    for_each,
    is_preprocessed,
    n_readers,
    noted_warnings,
    shard,
    share_of,
)
from madad.datasets import Scan
from madad.volumes.bids_derivative import Derivative

ROOT = Path(__file__).parents[2]
SECONDS = 120  # that no process may take


class Step(NamedTuple):
    """A command that goes over a cohort."""

    name: str
    before: tuple = ()
    after: tuple = ("--quiet",)
    image: str = ""
    table: str = ""

    def arguments(self, scans, out, *flags):
        return (self.name, *self.before, scans, out, *self.after, *flags)

    @property
    def sidecar(self):
        return self.image.replace(".nii.gz", ".json")


@pytest.fixture(scope="module", params=["preprocess", "predict"])
def step(request):
    if request.param == "preprocess":
        own_grid = ("--no-template", "--quiet")
        return Step("preprocess", (), own_grid, "desc-preproc_T1w.nii.gz", "preprocessing.tsv")
    model = request.getfixturevalue("model")
    return Step("predict", (model,), ("--quiet",), "stat-anomaly_statmap.nii.gz", "scores.tsv")


@pytest.fixture(scope="module")
def whole(run, step, cohort, tmp_path_factory):
    """The step's results of the cohort, by one run without a hitch."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, _, errors = run(*step.arguments(cohort, out))
    assert status == 0, errors
    return out


AT_ONCE = """
import json, os, sys
from madad import cli

running = []
for command, environment in json.loads(sys.argv[1]):
    running.append(os.fork())  # spares each the import
    if running[-1] == 0:
        os.environ.update(environment)
        sys.exit(cli.main(command))
sys.exit(any([os.waitpid(pid, 0)[1] for pid in running]))
"""


def at_once(*commands):
    """The status of commands that run at the same time, each with its variables of the environment."""
    given = [(list(map(str, arguments)), environment) for arguments, environment in commands]
    return process(["-c", AT_ONCE, json.dumps(given)]).wait(SECONDS)


def process(arguments):
    """Python as a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_until(is_so, running):
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


# Parts of a cohort


def options_of(**changed):
    defaults = {"shard": None, "overwrite": False, "dry_run": False, "json": False, "quiet": True}
    return argparse.Namespace(**(defaults | changed))


@pytest.mark.parametrize("n", [1, 3, 9])
def test_each_item_is_in_one_share(n, monkeypatch):
    by_flag = [share_of(range(7), options_of(shard=(part, n))) for part in range(1, n + 1)]
    assert sorted(sum(by_flag, [])) == list(range(7))
    assert max(map(len, by_flag)) - min(map(len, by_flag)) <= 1
    monkeypatch.setenv("WORLD_SIZE", str(n))
    for rank, share in enumerate(by_flag):
        monkeypatch.setenv("RANK", str(rank))
        assert share_of(range(7), options_of()) == share
        assert share_of(range(7), options_of(shard=(1, 1))) == list(range(7))  # what is asked for wins


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_an_environment_leaves_nothing_out(name, monkeypatch):
    monkeypatch.setenv(name, "3")
    assert share_of(range(7), options_of()) == list(range(7))


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("0", "x"), ("", "")])
def test_an_environment_that_is_no_part_is_refused(run, healthy, tmp_path, monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    status, _, errors = run("preprocess", healthy, tmp_path / "out", "--no-template")
    assert status == 2 and f"RANK must be a number from 0 and below WORLD_SIZE, got {rank!r}" in errors


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_is_one_of_the_parts(run, tmp_path, text):
    with pytest.raises(argparse.ArgumentTypeError, match="i/N"):
        shard(text)
    with pytest.raises(SystemExit) as ended:
        run("preprocess", tmp_path, tmp_path / "out", f"--shard={text}")
    assert ended.value.code == 2


def test_processes_at_the_same_time_leave_the_bytes_of_one_run(step, whole, cohort, tmp_path, tree):
    out = tmp_path / "out"
    shards = [(step.arguments(cohort, out, "--shard", f"{part}/2"), {}) for part in (1, 2)]
    assert at_once(*shards) == 0
    assert tree(out) == tree(whole)


def test_ranks_leave_the_bytes_of_one_run(run, step, whole, cohort, tmp_path, tree, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert run(*step.arguments(cohort, out))[0] == 0
    assert tree(out) == tree(whole)


@pytest.mark.slow
def test_registration_by_two_processes_leaves_the_bytes_of_one_run(on_template, tmp_path, tree):
    """One of the two scans is done already: a registration takes long."""
    table, prepared = on_template
    arguments = ("preprocess", table, tmp_path / "out", "--quiet")
    shutil.copytree(prepared, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "sub-h1")
    ranks = [(arguments, {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    assert at_once(*ranks) == 0
    assert tree(tmp_path / "out") == tree(prepared)


# Interruptions


def test_killed_in_the_middle_the_rerun_completes(run, step, whole, cohort, tmp_path, tree):
    out = tmp_path / "out"
    running = process(["-m", "madad", *step.arguments(cohort, out)])
    wait_until(lambda: len(list(out.rglob(f"sub-*_{step.sidecar}"))) >= 2, running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait(SECONDS)
    done = list(out.rglob(f"sub-*_{step.sidecar}"))
    assert 2 <= len(done) < 8
    for path in out.rglob("sub-*.nii.gz"):
        gzip.decompress(path.read_bytes())
    for path in out.rglob("sub-*.json"):
        json.loads(path.read_text())
        assert path.with_name(path.name.replace(".json", ".nii.gz")).exists()
    # What a kill while an image is written leaves, beside whole files and alone:
    for name in (done[0].parents[1].name, "sub-p2"):
        leftover = out / name / "anat" / f".{name}_{step.image}.0123abcd.tmp"
        leftover.parent.mkdir(parents=True, exist_ok=True)
        (leftover.parent / f"{name}_{step.sidecar}").unlink(missing_ok=True)
        leftover.write_bytes(b"half")
    assert run(*step.arguments(cohort, out))[0] == 0
    assert tree(out) == tree(whole)


@pytest.mark.parametrize(
    ("ending", "number", "overwrite"),
    [("image", errno.ENOSPC, False), ("sidecar", errno.EDQUOT, True), ("image", errno.EROFS, True)],
)
def test_a_full_disk_is_one_error_and_the_rerun_completes(
    run, step, whole, cohort, tmp_path, tree, monkeypatch, ending, number, overwrite
):
    out, replace = tmp_path / "out", os.replace
    if overwrite:
        shutil.copytree(whole, out)
    name = f"sub-p1_{getattr(step, ending)}"

    def full(source, target):
        if Path(target).name == name:
            raise OSError(number, os.strerror(number))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        status, _, errors = run(*step.arguments(cohort, out, *["--overwrite"] * overwrite))
    assert status == 2
    assert errors.count("\n") == 1 and errors.startswith("madad: error:")
    assert name in errors and os.strerror(number) in errors
    assert not list(out.rglob("*.tmp"))
    assert not (out / "sub-p1" / "anat" / f"sub-p1_{step.sidecar}").exists()
    assert (out / "sub-p0" / "anat" / f"sub-p0_{step.sidecar}").exists()
    for sidecar in out.rglob("sub-*.json"):
        assert sidecar.with_name(sidecar.name.replace(".json", ".nii.gz")).exists()
    assert run(*step.arguments(cohort, out))[0] == 0
    assert tree(out) == tree(whole)


def test_a_folder_that_cannot_be_written_to_is_one_error(run, step, cohort, tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refused)
    status, _, errors = run(*step.arguments(cohort, tmp_path / "out"))
    assert status == 2
    assert errors.count("\n") == 1 and "can be written to" in errors and str(tmp_path / "out") in errors
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("there", [False, True])
def test_a_read_only_folder_is_one_error(run, step, whole, cohort, tmp_path, tree, there):
    out = tmp_path / "out"
    if there:
        shutil.copytree(whole, out)
    folder = out if there else tmp_path
    before = tree(tmp_path)
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("for root no folder is read-only")
        status, _, errors = run(*step.arguments(cohort, out))
    finally:
        folder.chmod(0o755)
    assert status == 2 and errors.count("\n") == 1 and str(out) in errors
    assert tree(tmp_path) == before


# Failures


def test_bad_scans_cost_a_row_each_and_a_rerun_completes(run, step, bad_cohort, tmp_path, rows_of):
    table, repair = bad_cohort
    out = tmp_path / "out"
    status, printed, errors = run(*step.arguments(table, out))
    assert status == 1 and f"4 done, 0 skipped, {len(repair)} failed" in printed
    messages = {row["participant_id"]: row["message"] for row in rows_of(out / "errors.tsv")}
    assert set(messages) == {f"sub-{name}" for name in repair}
    for name, (_, text) in repair.items():
        assert text in messages[f"sub-{name}"], messages[f"sub-{name}"]
        assert f"{name}.nii" in messages[f"sub-{name}"]
        assert f"sub-{name}: failed: {messages[f'sub-{name}']}\n" in errors
        assert not (out / f"sub-{name}").exists()
    rows = {row["participant_id"]: row for row in rows_of(out / step.table)}
    assert set(rows) == {"sub-good", "sub-negative", "sub-somenan", "sub-zgood"}
    assert "NaN" in rows["sub-somenan"]["warning"] and rows["sub-good"]["warning"] == "n/a"
    assert errors.count("warning:") == 1 and "sub-somenan: warning:" in errors
    assert not list(out.rglob("*.tmp"))
    assert run(*step.arguments(table, out))[1].startswith("0 done, 4 skipped")
    for mend, _ in repair.values():
        mend()
    status, printed, errors = run(*step.arguments(table, out))
    assert (status, errors) == (0, "")
    assert printed.startswith(f"{len(repair)} done, 4 skipped")
    assert rows_of(out / "errors.tsv") == []
    assert len(rows_of(out / step.table)) == 4 + len(repair)
    assert not list((out / ".madad").rglob("*.json"))


def test_shards_with_bad_scans_leave_one_table_of_errors(run, step, bad_cohort, tmp_path, tree):
    table, _ = bad_cohort
    for name, shards in (("one", ["1/1"]), ("three", ["2/3", "3/3", "1/3"])):
        statuses = [run(*step.arguments(table, tmp_path / name, "--shard", part))[0] for part in shards]
        assert set(statuses) <= {0, 1} and 1 in statuses
    assert tree(tmp_path / "three") == tree(tmp_path / "one")


def test_done_again_what_fails_now_keeps_its_results_and_is_tried_again(
    run, step, whole, cohort, patients, tmp_path, tree, rows_of
):
    out, image = tmp_path / "out", patients.parent / "p1.nii.gz"
    shutil.copytree(whole, out)
    command = step.arguments(cohort, out)
    away = image.rename(tmp_path / "away")
    try:
        assert run(*command)[0] == 0  # done is done
        for flags in (["--overwrite"], []):
            assert run(*command, *flags)[0] == 1
            assert [row["participant_id"] for row in rows_of(out / "errors.tsv")] == ["sub-p1"]
            assert tree(out / "sub-p1") == tree(whole / "sub-p1")
    finally:
        away.rename(image)
    assert run(*command)[0] == 0
    assert tree(out) == tree(whole)


def folder_of(tmp_path):
    folder = Derivative(tmp_path / "out")
    folder.start(name="Maps", step="predict", parameters={}, source=tmp_path)
    return folder


def test_one_after_the_other(tmp_path):
    folder = folder_of(tmp_path)
    scans = [(Scan(name, {}), partial(str, name)) for name in ("a", "b", "c", "d")]
    worked = []

    def work(scan, item, noted):
        assert scan.subject == item and noted == []
        worked.append(item)
        if item == "b":
            raise ValueError("no  brain\nin b")
        return ["odd"] if item == "c" else []

    common = {"is_done": lambda scan: scan.subject == "d", "folder": folder}
    dry = for_each(scans, work, options=options_of(dry_run=True), **common)
    assert (dry.done, dry.skipped, worked) == (["sub-a", "sub-b", "sub-c"], ["sub-d"], [])
    tally = for_each(scans, work, options=options_of(), **common)
    assert worked == ["a", "b", "c"] and tally.status == 1
    expected = Tally(["sub-a", "sub-c"], ["sub-d"], {"sub-b": "no brain in b"}, {"sub-c": ["odd"]})
    assert tally == expected
    for_each(scans[3:], work, options=options_of(overwrite=True), **common)
    assert worked[3:] == ["d"]


@pytest.mark.parametrize("error", [KeyError("a bug"), ImportError("SimpleITK"), KeyboardInterrupt()])
def test_what_each_scan_would_meet_ends_the_cohort(tmp_path, error):
    def load():
        raise error

    with pytest.raises(type(error)):
        for_each(
            [(Scan("a", {}), load)],
            lambda scan, item, noted: [],
            is_done=lambda scan: False,
            folder=folder_of(tmp_path),
            options=options_of(),
        )


def test_warnings_are_noted_once_and_only_those_for_users():
    with pytest.warns(DeprecationWarning, match="of another library") as shown:
        with noted_warnings() as noted:
            for _ in range(2):
                warnings.warn("Poor.", stacklevel=1)
            warnings.warn("of another library", DeprecationWarning, stacklevel=1)
    assert len(shown) == 1
    assert noted == ["Poor."]
    with noted_warnings(noted):
        for text in ("Poor.", "Odd."):
            warnings.warn(text, stacklevel=1)
    assert noted == ["Poor.", "Odd."]


# Readers


def test_readers_leave_the_bytes_of_one_process(run, step, bad_cohort, tmp_path, tree):
    """Warnings and failures of bad scans included."""
    table, repair = bad_cohort
    said = {}
    for n in ("0", "2"):
        if n == "2":  # one is there already, the fifth of fifteen
            assert run(*step.arguments(table, tmp_path / n, "--shard", "5/15"))[0] == 0
        status, printed, said[n] = run(*step.arguments(table, tmp_path / n, "--readers", n))
        done = "4 done, 0 skipped" if n == "0" else "3 done, 1 skipped"
        assert status == 1 and f"{done}, {len(repair)} failed" in printed
    assert said["0"] == said["2"]
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


def test_a_scan_that_kills_its_reader_costs_a_row(tmp_path, rows_of):
    folder = folder_of(tmp_path)
    loads = dict.fromkeys("acde", partial(str, "read")) | {"b": partial(signal.raise_signal, signal.SIGKILL)}
    tally = for_each(
        [(Scan(name, {}), loads[name]) for name in sorted(loads)],
        lambda scan, item, noted: [item],
        is_done=lambda scan: False,
        folder=folder,
        options=options_of(),
        readers=1,
    )
    folder.write_errors()
    assert tally.done == ["sub-a", "sub-c", "sub-d", "sub-e"] and list(tally.failed) == ["sub-b"]
    (row,) = rows_of(folder.root / "errors.tsv")
    assert row["participant_id"] == "sub-b" and f"got exit code {-signal.SIGKILL}" in row["message"]


@pytest.mark.parametrize("text", ["-1", "1.5", ""])
def test_readers_are_a_number(run, step, healthy, tmp_path, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"whole number from 0, got '{text}'"):
        n_readers(text)
    with pytest.raises(SystemExit) as ended:
        run(*step.arguments(healthy, tmp_path / "out", f"--readers={text}"))
    assert ended.value.code == 2


# Input


def test_the_bar_is_on_stderr_and_json_alone_on_stdout(run, step, cohort, tmp_path):
    loud = [word for word in step.arguments(cohort, tmp_path / "out") if word != "--quiet"]
    status, printed, errors = run(*loud, "--shard", "1/8")
    assert status == 0 and printed.startswith("1 done") and "scans: 100%" in errors and "file/s" in errors
    status, printed, errors = run(*loud, "--json")
    facts = json.loads(printed)
    assert status == 0 and errors == ""
    assert (len(facts["done"]), len(facts["skipped"]), facts["failed"]) == (7, 1, {})


def test_a_dry_run_writes_nothing(run, step, whole, cohort, tmp_path, tree):
    command = step.arguments(cohort, tmp_path / "out", "--dry-run")
    assert run(*command, "--shard", "1/2")[1].startswith("4 to do, 0 skipped")
    status, printed, _ = run(*command, "--json")
    assert status == 0 and len(json.loads(printed)["done"]) == 8 and json.loads(printed)["dry_run"]
    assert not (tmp_path / "out").exists()
    before = tree(whole)
    assert run(*step.arguments(cohort, whole, "--dry-run"))[1].startswith("0 to do, 8 skipped")
    assert tree(whole) == before


@pytest.mark.parametrize("kind", ["missing", "empty", "no.nii"])
def test_nothing_to_go_over_is_one_error(run, step, tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "no.nii":
        path = tmp_path / "thesis.pdf"
        path.write_text("mine")
    status, _, errors = run(*step.arguments(path, tmp_path / "out"))
    assert status == 2 and errors.count("\n") == 1 and str(path) in errors
    assert not (tmp_path / "out").exists()


def test_results_of_each_command_are_told_apart(run, step, whole, cohort, healthy, model, tree):
    assert is_preprocessed([whole]) == (step.name == "preprocess")
    assert not is_preprocessed([whole, whole]) and not is_preprocessed([healthy.parent])
    before = tree(whole)
    other = "predict" if step.name == "preprocess" else "preprocess"
    status, _, errors = run(other, *[model] * (other == "predict"), cohort, whole, "--overwrite")
    assert status == 2 and "something else" in errors and str(whole) in errors
    assert tree(whole) == before


def as_table(folder, scans, save):
    rows = ["image\tsubject\tcontrast\tlesion_mask\n"]
    for name, values, lesion in scans:
        save(folder / "images" / f"{name}x.nii.gz", values)
        save(folder / "masks" / f"{name}y.nii.gz", lesion, dtype=np.uint8)
        rows.append(f"images/{name}x.nii.gz\tsub-{name}\tT1w\tmasks/{name}y.nii.gz\n")
    (folder / "scans.tsv").write_text("".join(rows))
    return [folder / "scans.tsv"]


def as_bids(folder, scans, save):
    for name, values, lesion in scans:
        save(folder / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz", values)
        masks = folder / "derivatives" / "rater" / f"sub-{name}" / "anat"
        save(masks / f"sub-{name}_label-L_mask.nii.gz", lesion, dtype=np.uint8)
    (folder / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    return [folder]


def as_folder(folder, scans, save):
    for name, values, lesion in scans:
        save(folder / name / "T1.nii.gz", values)
        save(folder / name / "lesion.nii.gz", lesion, dtype=np.uint8)
    return [folder]


def as_files(folder, scans, save):
    return [
        save(folder / f"{name}{ending}.nii.gz", values, dtype=dtype)
        for name, *arrays in scans
        for ending, values, dtype in zip(("", "_lesion"), arrays, (np.float32, np.uint8), strict=True)
    ]


@pytest.mark.parametrize("write", [as_table, as_bids, as_folder, as_files])
def test_from_scans_to_maps_and_their_quality(run, model, patients, brain, save, tmp_path, tree, write):
    scans = [(f"p{i}", *brain(50 + i, lesion=True)[::2]) for i in (0, 2)]
    inputs = write(tmp_path / "raw", scans, save)
    named = ("--contrast", "T1") if write is as_files else ()
    out = {name: tmp_path / name for name in ("prepared", "maps", "again", "quality", "expected")}
    assert run("preprocess", *inputs, out["prepared"], "--no-template", "--quiet", *named)[0] == 0
    assert run("predict", model, *inputs, out["maps"], "--quiet", *named)[0] == 0
    assert run("predict", model, out["prepared"], out["again"], "--quiet")[0] == 0
    assert run("predict", model, patients, out["expected"], "--quiet", "--shard", "1/1")[0] == 0

    def images(folder):
        return {path: content for path, content in tree(folder).items() if path.endswith(".nii.gz")}

    expected = {path: content for path, content in images(out["expected"]).items() if "sub-p1" not in path}
    assert images(out["maps"]) == images(out["again"]) == expected
    assert (out["maps"] / "scores.tsv").read_bytes() == (out["again"] / "scores.tsv").read_bytes()
    command = ("evaluate", model, out["prepared"], "--out", out["quality"], "--no-figures", "--json")
    status, printed, _ = run(*command)
    assert status == 0 and json.loads(printed)["volumes"] == 2


def test_results_are_not_taken_for_scans(run, step, brain, save, tmp_path, tree):
    for i in range(2):
        save(tmp_path / "raw" / f"h{i}_T1.nii.gz", brain(i)[0])
    raw = tmp_path / "raw"
    for out in (raw / "out", raw / "a" / "b", raw):
        status, _, errors = run(*step.arguments(raw, out))
        assert status == 2 and "OUT must not be searched for scans" in errors and str(out) in errors
    assert len(tree(tmp_path)) == 2
    for out in (raw / "derivatives" / "out", raw / ".out", tmp_path / "raw-out"):
        for done in ("2 done, 0 skipped", "0 done, 2 skipped"):
            assert run(*step.arguments(raw, out))[1].startswith(done)


# BIDS


@pytest.fixture(scope="module")
def bids(brain, save, tmp_path_factory):
    """A BIDS folder: two sessions, three contrasts, expert masks, and a scan that is cut short."""
    raw = tmp_path_factory.mktemp("bids") / "raw data"
    for subject in ("01", "02"):
        for session in ("1", "2"):
            anat, name = Path(f"sub-{subject}", f"ses-{session}", "anat"), f"sub-{subject}_ses-{session}"
            for ending, contrast in (("T1w", "T1"), ("ce-gadolinium_T1w", "T1"), ("FLAIR", "FLAIR")):
                save(raw / anat / f"{name}_{ending}.nii.gz", brain(int(subject), contrast=contrast)[0])
            lesion = brain(0, lesion=True)[2]
            masks = raw / "derivatives" / "raters" / anat
            save(masks / f"{name}_label-L_mask.nii.gz", lesion, dtype=np.uint8)
    bad = raw / "sub-03" / "anat" / "sub-03_T1w.nii.gz"
    bad.parent.mkdir(parents=True)
    bad.write_bytes((raw / anat / f"{name}_T1w.nii.gz").read_bytes()[:9000])
    (raw / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    return raw


def test_a_bids_folder_gives_sessions_contrasts_and_uris(run, step, bids, tmp_path, tree, rows_of):
    out = tmp_path / "out"
    assert run(*step.arguments(bids, out))[0] == 1
    names = set(tree(out))
    endings = {"preprocess": ("desc-preproc_FLAIR", "ce-gadolinium_desc-preproc_T1w", "desc-preproc_T1w")}
    for ending in endings.get(step.name, ("stat-anomaly_statmap", "label-L_desc-madad_mask")):
        for suffix in (".nii.gz", ".json"):
            assert f"sub-02/ses-2/anat/sub-02_ses-2_{ending}{suffix}" in names
    sidecar = json.loads((out / "sub-02" / "ses-1" / "anat" / f"sub-02_ses-1_{step.sidecar}").read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz"]
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "madad"
    assert description["DatasetLinks"]["raw"] == bids.as_uri()
    found = {(row["participant_id"], row["session_id"]) for row in rows_of(out / step.table)}
    assert found == {(f"sub-0{i}", f"ses-{j}") for i in (1, 2) for j in (1, 2)}
    (row,) = rows_of(out / "errors.tsv")
    assert (row["participant_id"], row["session_id"]) == ("sub-03", "n/a")


def test_in_the_derivatives_of_its_source(run, step, bids, tmp_path, tree):
    raw = tmp_path / "raw"
    shutil.copytree(bids, raw)
    out = raw / "derivatives" / "madad"
    assert run(*step.arguments(raw, out))[0] == 1
    before = tree(out)
    (out / "sub-02" / "ses-1" / "anat" / f"sub-02_ses-1_{step.sidecar}").unlink()  # an interrupted run
    for flags in ([], ["--overwrite"]):
        assert run(*step.arguments(raw, out, *flags))[0] == 1
        assert tree(out) == before


def errors_of_validator(folder):
    validator = shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("bids-validator-deno is missing: pip install bids-validator-deno")
    ran = subprocess.run([validator, folder, "--format", "json"], capture_output=True, text=True, check=False)
    issues = json.loads(ran.stdout)["issues"]["issues"]
    found = [issue for issue in issues if issue["severity"] == "error"]
    return found or ran.returncode


def test_the_bids_validator_accepts_the_results(run, step, bids, tmp_path):
    out = tmp_path / "out"
    assert run(*step.arguments(bids, out))[0] == 1
    for path in (out, out / "sub-01" / "ses-1" / "anat"):  # what a killed run leaves
        (path / f".sub-01_ses-1_{step.image}.0123abcd.tmp").write_bytes(b"half")
    assert errors_of_validator(out) == 0


@pytest.mark.slow
def test_the_bids_validator_accepts_results_on_the_template(on_template):
    assert errors_of_validator(on_template[1]) == 0


# What may be taken for what


def save_on_other_grid(save, path, values):
    """The volume without some of its border, so that its grid is another."""
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = np.array([-70, -90, -60]) + 4.0 * np.array([1, 0, 2])
    return save(path, values[1:, :, 2:], affine=affine)


@pytest.fixture(scope="module")
def on_two_grids(run, brain, save, write_table, tmp_path_factory):
    """A table of T1 and FLAIR on two grids, with lesion masks drawn on FLAIR, and these preprocessed."""
    folder, rows = tmp_path_factory.mktemp("grids"), []
    for i in range(3):
        values, inside, lesion = brain(i, lesion=True)
        flair, _, _ = brain(i, contrast="FLAIR", lesion=True)
        masks = {
            "lesion_mask": save_on_other_grid(
                save, folder / f"g{i}_lesion.nii.gz", lesion.astype(np.float32)
            ),
            "brain_mask": save(folder / f"g{i}_brain.nii.gz", inside, dtype=np.uint8),
        }
        for name, image in (
            ("FLAIR", save_on_other_grid(save, folder / f"g{i}_FLAIR.nii.gz", flair)),
            ("T1", save(folder / f"g{i}_T1.nii.gz", values)),
        ):
            rows.append({"subject": f"g{i}", "contrast": name, "image": image, **masks})
    table = write_table(folder / "scans.tsv", rows)
    assert run("preprocess", table, folder / "prepared", "--no-template", "--quiet")[0] == 0
    return table, folder / "prepared"


@pytest.mark.parametrize("contrasts", [("FLAIR",), ("flair", "t1w")])
def test_any_choice_of_contrasts_is_prepared_as_in_training(run, on_two_grids, tmp_path, contrasts):
    table, prepared = on_two_grids
    model = tmp_path / "model"
    options = ("--preset", "tiny", "--spacing-mm", "4", "--device", "cpu", "--quiet")
    assert run("fit", prepared, model, *options, "--contrasts", *contrasts)[0] == 0
    for scans, out in ((table, "raw"), (prepared, "again")):
        assert run("predict", model, scans, tmp_path / out, "--quiet")[0] == 0
    maps = sorted((tmp_path / "raw").rglob("*_statmap.nii.gz"))
    assert len(maps) == 3
    for path in maps:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "raw")).read_bytes()
    if len(contrasts) == 2:  # the mask was drawn on one of them
        status, _, errors = run("evaluate", model, table, "--out", tmp_path / "e", "--no-figures", "--quiet")
        assert (status, errors) == (0, "")
        assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["volumes"] == 3


def test_a_contrast_twice_is_refused(run, on_two_grids, tmp_path):
    status, _, errors = run("fit", on_two_grids[1], tmp_path / "model", "--contrasts", "T1", "t1")
    assert status == 2 and "['T1', 'T1']" in errors


def test_another_person_of_the_same_name_is_not_skipped_as_done(
    run, step, brain, save, write_table, tmp_path, tree
):
    for site in ("a", "b"):
        image = save(tmp_path / site / "p01_T1.nii.gz", brain(ord(site))[0])
        write_table(tmp_path / f"{site}.tsv", [{"subject": "p01", "contrast": "T1", "image": image}])
    out = tmp_path / "out"
    assert run(*step.arguments(tmp_path / "a.tsv", out))[0] == 0
    before = tree(out)
    status, _, errors = run(*step.arguments(tmp_path / "b.tsv", out))
    assert status == 2
    assert "same scans" in errors and "/a/p01_T1.nii.gz" in errors and "/b/p01_T1.nii.gz" in errors
    assert tree(out) == before


def test_a_part_of_our_results_is_not_taken_for_scans(run, step, prepared, tmp_path):
    for scans in (prepared / "sub-h1", prepared / "sub-h1" / "anat" / "sub-h1_desc-preproc_T1w.nii.gz"):
        status, _, errors = run(*step.arguments(scans, tmp_path / "out"))
        assert status == 2 and "scans as they came" in errors and str(prepared) in errors
    assert not (tmp_path / "out").exists()


def test_links_lead_to_the_file_that_was_read(run, model, brain, save, write_table, tmp_path):
    save(tmp_path / "real" / "images" / "p_T1.nii.gz", brain(4)[0])
    (tmp_path / "real" / "tables").mkdir()
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "link").symlink_to(tmp_path / "real" / "tables")
    row = {"subject": "p", "contrast": "T1", "image": "../images/p_T1.nii.gz"}
    table = write_table(tmp_path / "far" / "link" / "t.tsv", [row])
    assert run("preprocess", table, tmp_path / "prepared", "--no-template", "--quiet")[0] == 0
    assert run("predict", model, tmp_path / "prepared", tmp_path / "maps", "--quiet")[0] == 0


def test_what_is_out_of_range_is_said_before_anything_is_trained(run, prepared, model, patients, tmp_path):
    status, _, errors = run("fit", prepared, tmp_path / "model", "--median-slices", "2", "--preset", "tiny")
    assert status == 2 and "median_slices must be an odd number" in errors
    assert not list(tmp_path.rglob("checkpoints/*"))
    for flags in (("--threshold", "5"), ("--threshold", "nan")):
        with pytest.raises(SystemExit):
            run("predict", model, patients, tmp_path / "out", *flags)
    status, _, errors = run("predict", model, patients, tmp_path / "out", "--device", "abacus")
    assert status == 2 and "'abacus'" in errors
    command = ("evaluate", model, patients, "--out", tmp_path / "out", "--card", "--threshold", "0.5")
    status, _, errors = run(*command)
    assert status == 2 and "--threshold must be the model's" in errors and "0.5" in errors
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_refused(run, step, whole, cohort, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, errors = run(*step.arguments(cohort, tmp_path, "--dry-run"))
    assert status == 2 and "something else" in errors


def test_masks_of_our_own_are_no_further_knowledge(run, brain, save, tmp_path, rows_of):
    raw = tmp_path / "raw"
    save(raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz", brain(5)[0])
    for out in (raw / "derivatives" / "prep", tmp_path / "again"):
        assert run("preprocess", raw, out, "--no-template", "--quiet")[0] == 0
        assert rows_of(out / "preprocessing.tsv")[0]["brain_made_by"] == "stripped"
