"""The command line is instant where it can be, and says what is wrong where it must."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zoo
from tasks.__main__ import _COMMANDS, main
from tasks.cli import CONFIGS, _with_ours


def test_help_is_instant():
    def seconds():
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from tasks.__main__ import main; main(['--help'])"], check=True, capture_output=True
        )
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "args", [["--help"], ["language", "--help"], ["models", "--help"], ["bench", "--help"], ["models"], ["nonsense"]]
)
def test_what_shows_no_options_imports_no_heavy_library(args):
    code = (
        "import sys; from tasks.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)


def test_the_modules_of_tasks_print_the_same_help_without_heavy_imports():
    code = "import sys, runpy; sys.argv = ['x', '--help']; runpy.run_module('tasks.language', run_name='__main__')"
    probe = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    shown, _, imported = done.stdout.strip().rpartition("\n")
    assert imported == "False"
    direct = subprocess.run(
        [sys.executable, "-c", "from tasks.__main__ import main; main(['language', '--help'])"],
        capture_output=True,
        text=True,
    )
    assert shown == direct.stdout.strip()
    assert "fit" in shown


def test_help_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("language", "models", "demo", "report", "bench"))


@pytest.mark.parametrize("args", [["--help"], ["models"], ["language", "--help"], ["--version"]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_traceback(args, buffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    command = [sys.executable, "-m", "tasks", *args]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_still_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "tasks", "models"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert b"No space left" in done.stderr


def test_ctrl_c_is_no_traceback(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(_COMMANDS, "models", interrupted)
    assert main(["models"]) == 130


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == zoo.__version__


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["modles"], "did you mean models?"),
        (["langauge", "fit"], "did you mean language, vision_language"),
        (["language", "fti"], "did you mean fit"),
        (["models", "language/mixtral_tny"], "did you mean language/mixtral_tiny"),
        (["models", "--router"], "did you mean --routers?"),
        (["models", "--routers", "TopkRouter"], "did you mean TopKRouter"),
        (["models", "a", "b"], "takes one pattern, got a, b"),
        (["bench", "moes"], "did you mean moe?"),
        (["language", "fit", "--config", "configs/language/mixtral_tiy.yaml"], "mixtral_tiny.yaml"),
    ],
)
def test_a_wrong_name_lists_the_nearest_known_ones(args, told, capsys):
    assert main(args) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_models_are_listed_by_pattern(capsys):
    assert main(["models"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == zoo.list_models()
    assert main(["models", "*mixtral*"]) == 0
    assert capsys.readouterr().out.split() == [
        "language/mixtral_8x22b",
        "language/mixtral_8x7b",
        "language/mixtral_tiny",
        "vision_language/llava_mixtral_tiny",
    ]


def test_routers_are_listed(capsys):
    assert main(["models", "--routers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert "TopKRouter" in names
    gates = [name for name in names if not name.startswith("zoo.moe.")]
    assert all(issubclass(getattr(zoo.moe.routers, name), zoo.moe.Router) for name in gates)
    assert "Router" not in names
    layers = {"PEER", "MixtureOfDepths", "MoA", "MoH", "SwitchHead", "PatchMoE", "DeepMoE"}
    assert {f"zoo.moe.{name}" for name in layers} <= set(names)
    assert all(len(line.split()) > 4 for line in lines)
    assert any(line.startswith("GShardRouter") and "2006.16668" in line for line in lines)


def test_a_config_file_that_is_no_yaml_is_one_error(tmp_path, capsys):
    broken, scalar = tmp_path / "broken.yaml", tmp_path / "scalar.yaml"
    broken.write_text("model: [1,\n")
    scalar.write_text("just words\n")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: {network: süß}".encode("latin-1"))
    assert main(["language", "fit", "--config", str(latin)]) == 2
    assert "latin.yaml is not YAML" in capsys.readouterr().err
    assert main(["language", "fit", "--config", str(broken)]) == 2
    assert "broken.yaml is not YAML" in capsys.readouterr().err
    assert main(["language", "fit", f"--config={scalar}"]) == 2
    assert "expected sections model, data and trainer, got str" in capsys.readouterr().err


def test_configs_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", "configs/language/mixtral_tiny.yaml", "--gpus", "2"]) == 0
    capsys.readouterr()
    assert main(["language", "fit", "--config", "configs/language/mixtral_tini.yaml"]) == 2
    assert "did you mean configs/language/mixtral_tiny.yaml" in capsys.readouterr().err
    for args in (["--config", "configs/language/mixtral_tiny.yaml"], ["--config=configs/language/mixtral_tiny.yaml"]):
        told = _with_ours([*args, "--trainer.max_steps", "3"])
        assert Path(told[-3].removeprefix("--config=")).samefile(CONFIGS / "language" / "mixtral_tiny.yaml")
    # One's own of the same name goes first.
    own = tmp_path / "configs" / "language" / "mixtral_tiny.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("model: {network: nothing/here}")
    assert main(["plan", "--config", "configs/language/mixtral_tiny.yaml", "--gpus", "2"]) == 2
    assert "nothing/here" in capsys.readouterr().err
