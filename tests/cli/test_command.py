"""The front door: help, wrong command lines, exit codes; none of them imports torch."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from inlay.cli import main as door
from inlay.cli.main import VERBS, main
from inlay.cli.train import GROUPS
from inlay.tasks.config import load_config, run_keys

HEAVY = ("torch", "transformers", "datasets", "trl", "numpy", "scipy")
LIGHT_LINES = [
    [],
    ["--help"],
    ["--version"],
    ["trian"],
    ["--hepl"],
    *([verb, "--help"] for verb in VERBS),
    *([verb, "--no-such-flag"] for verb in VERBS),
    ["train", "--method", "lroa", "--model", "m", "--data", "d", "--output", "o"],
    ["train", "--model", "pocket", "--data", "reports", "--output", "x", "--print-config"],
    ["train", "no-such-file.yaml"],
    ["methods"],
    ["methods", "lora"],
]


def test_no_help_and_no_wrong_line_imports_torch() -> None:
    code = (
        "import sys\n"
        "from inlay.cli.main import main\n"
        f"for words in {LIGHT_LINES!r}:\n"
        "    assert main(words) in (0, 2), words\n"
        f"    loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not loaded, (words, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command() -> None:
    line = [sys.executable, "-m", "inlay", "trian"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Did you mean 'train'?" in done.stderr


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_says_what_there_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: inlay")
    assert err == ""


def test_every_key_of_a_run_stands_in_the_help_once(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    out = capsys.readouterr().out
    keys = set(run_keys()) - {"hyperparameters"}
    assert {key for group in GROUPS.values() for key in group} == keys
    assert sum(len(group) for group in GROUPS.values()) == len(keys)
    assert all("--" + key.replace("_", "-") in out for key in keys)
    assert "--rank N" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "there is no verb 'trian'; the verbs are"),
        (["--verison"], "there is no flag '--verison'"),
        (["train", "--rnk", "8"], "there is no flag '--rnk'. Did you mean '--rank'?"),
        (["train", "--lr", "8"], "there is no flag '--lr'. Did you mean '--learning-rate'?"),
        (["train", "--learning", "8"], "there is no flag '--learning'."),
        (["train", "--rank"], "--rank needs a value."),
        (["train", "--targets"], "--targets needs one or more values."),
        (["train", "--rank", "8", "--rank", "9"], "--rank is given twice."),
        (["train", "--resume=yes"], "--resume/--no-resume takes no value"),
        (["train", "a.yaml", "b.yaml"], "unexpected argument 'b.yaml'."),
        (["train", "--model", "pocket"], "'data' is missing"),
        (["train", "nowhere.yaml"], "the run file nowhere.yaml cannot be read"),
        (["methods", "lroa"], "there is no method 'lroa'"),
        (["eval", "--adapter", "x"], "'data' is missing"),
        (["merge", "--adapter", "x"], "'output' is missing"),
        (["demo", "--otput", "x"], "Did you mean '--output'?"),
    ],
)
def test_a_wrong_line_is_a_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert "--help`." in err
    assert all(line.startswith("inlay: ") for line in err.splitlines())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rank", "3.5"], "'rank' must be a whole number, not 3.5"),
        (["--storage", "fp4"], "'storage' must be one of"),
        (["--epochs", "-1"], "'epochs' must be a number above 0, not -1"),
        (["--method", "loar"], "Did you mean 'lora'?"),
        (["--split", "0.5", "0.1", "0.1"], "'split' must add up to 1"),
    ],
)
def test_a_wrong_value_is_a_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--model", "pocket", "--data", "reports", "--output", "x", *flags]
    assert main(line) == 2
    assert sentence in capsys.readouterr().err


def test_flags_override_the_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: pocket\ndata: reports\noutput: here\nrank: 4\nepochs: 1\n")
    assert main(["train", str(run), "--rank", "8", "--packing", "bfd", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["rank"], printed["epochs"], printed["packing"]) == (8, 1, "bfd")


def test_the_printed_run_is_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "pocket", "--data", "reports", "--output", "o", "--rank", "8"]
    flags += ["--targets", "q_proj", "v_proj", "--learning-rate", "1e-5", "--dropout", "0.1"]
    assert main(["train", *flags, "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load_config(printed)
    assert config.targets == ["q_proj", "v_proj"]
    assert config.learning_rate == 1e-5
    assert config.hyperparameters["rank"] == 8
    assert main(["train", str(printed), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed.read_text())


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            2,
            "no space left on device: a/b",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "permission denied: a"),
        (MemoryError(), 2, "out of memory"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(
    error: BaseException,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(door, "dispatch", raising(error))
    assert main(["train"]) == code
    assert sentence in capsys.readouterr().err


def test_a_bug_is_a_sentence_and_its_traceback_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(door, "dispatch", raising(ZeroDivisionError("oh")))
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("inlay: this is a bug in Inlay: ZeroDivisionError: oh.")
    [written] = tmp_path.iterdir()
    assert str(written) in err
    assert "Traceback" in written.read_text()
    assert main(["train", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    line = f"{sys.executable} -m inlay train --help | head -c 10"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "usage: inl"
    assert done.stderr == ""


def raising(error: BaseException):
    def dispatch(words: list[str]) -> int:
        raise error

    return dispatch


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_verb_without_a_run_says_what_is_missing(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb]) == 2
    assert "'model' is missing" in capsys.readouterr().err
