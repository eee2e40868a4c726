import os
import subprocess
import sys
from pathlib import Path

import pytest

import madad
from madad import cli

ERRORS = (ValueError("a\nb"), TypeError("no"), FileNotFoundError("none"), ImportError("not installed"))


@pytest.mark.parametrize(
    "arguments",
    [[], ["dream"], ["demo", "--size", "large"], ["demo", "--wings"], ["info"], ["convert", "a"]],
    ids=" ".join,
)
def test_wrong_arguments_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: madad" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"madad {madad.__version__}\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    shown = capsys.readouterr()
    assert stopped.value.code == 0 and shown.err == ""
    assert "usage: madad" in shown.out and "demo" in shown.out


def test_python_m_madad():
    package = str(Path(madad.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", "madad"]
    options = {"env": os.environ | {"PYTHONPATH": path}, "capture_output": True, "text": True, "timeout": 120}
    failed = subprocess.run([*command, "demo", "--data", "none.npz", "--out", os.devnull], **options)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith("madad: error:") and "Warning" not in failed.stderr


def raising(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize("status", [0, 1])
def test_the_status_is_the_commands(run, monkeypatch, status):
    monkeypatch.setattr(cli.info, "run", lambda options: status)
    assert run("info", "model") == (status, "", "")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_the_user_can_mend_has_status_2(run, monkeypatch, error):
    monkeypatch.setattr(cli.info, "run", raising(error))
    assert run("info", "model") == (2, "", f"madad: error: {error}\n")


def test_an_interrupt_has_status_130(run, monkeypatch):
    monkeypatch.setattr(cli.info, "run", raising(KeyboardInterrupt()))
    assert run("info", "model") == (130, "", "madad: interrupted\n")


def test_a_mistake_of_ours_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(cli.info, "run", raising(KeyError("bug")))
    with pytest.raises(KeyError, match="bug"):
        run("info", "model")


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
def test_every_command_says_what_it_does(command, capsys):
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"usage: madad {name}" in shown and len(shown.splitlines()) > 5
