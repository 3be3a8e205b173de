"""The machine and its user's settings have no say in what is made, and what they prevent is said in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from reliability import ends_as, is_said_as
from synthetic import in_memory, study
from workflow_copy import HANGS, ROOT

from gdn_mup.errors import LAST_LINE, MachineError, UserError, ending
from gdn_mup.kernels import cache
from gdn_mup.study import figures
from gdn_mup.study.figures import style

RC = """font.family: serif
font.size: 30
savefig.bbox: tight
savefig.dpi: 20
axes.prop_cycle: cycler("color", ["red"])
lines.linewidth: 9
svg.fonttype: none
axes.grid: True
text.usetex: True
backend: QtAgg
"""


def gdn_mup(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gdn_mup", *arguments]
    options = {"cwd": cwd, "env": os.environ | environment, "capture_output": True, "timeout": 100}
    return subprocess.run(command, text=True, errors="replace", **options)


# ---- figures ----


def test_figures_are_the_same_bytes_whatever_matplotlib_is_told(tmp_path: Path) -> None:
    def draw(name: str) -> list[bytes]:
        drawing = figures.lr_transfer(in_memory(study(), "lr_sweep"), "adamw")
        style.save(*drawing, tmp_path / name)
        return [(tmp_path / f"{name}.{suffix}").read_bytes() for suffix in ("svg", "png", "csv")]

    plain = draw("plain")
    told = {"font.family": "serif", "font.size": 30, "savefig.bbox": "tight", "savefig.dpi": 20, "axes.grid": True}
    with plt.rc_context(told | {"text.usetex": True, "svg.fonttype": "none", "lines.linewidth": 9}):
        assert matplotlib.rcParams["font.size"] == 30  # the user's own stay as they are
        plt.style.use("dark_background")
        assert draw("dark") == plain


CHECKED = """
import torch

class Model(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = torch.nn.Embedding(17, width)
        self.hidden = torch.nn.Linear(width, width)
        self.readout = torch.nn.Linear(width, 17)

    def forward(self, tokens):
        return self.readout(torch.relu(self.hidden(self.embed(tokens))))

batches = [torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]

def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the user's, and the figure of its check as it is drawn for everybody."""
    folder = tmp_path_factory.mktemp("checked")
    (folder / "mine.py").write_text(CHECKED)
    check(folder, "plain")
    return folder


def check(folder: Path, output: str, **environment: str) -> None:
    options = ("--widths", "32", "64", "--seeds", "1", "--output", output)
    done = gdn_mup("check", "mine:Model", *options, cwd=folder, **environment)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nonsense", "module://ipympl.backend_nbagg"])
def test_a_check_draws_the_same_bytes_whatever_the_user_has_set(checked: Path, backend: str) -> None:
    (checked / "matplotlibrc").write_text(RC)
    check(checked, "told", MPLBACKEND=backend, MATPLOTLIBRC=str(checked / "matplotlibrc"))
    for suffix in ("svg", "png", "csv"):
        told, plain = (checked / output / f"coordinates.{suffix}" for output in ("told", "plain"))
        assert told.read_bytes() == plain.read_bytes()


def run_notebook(folder: Path, output: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "src").is_symlink() or (folder / "src").symlink_to(ROOT / "src")
    (folder / "pyproject.toml").is_symlink() or (folder / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    script, notebook = ROOT / "workflow/scripts/run_notebook.py", ROOT / "notebooks/coordinate_check.ipynb"
    data = ROOT / "results/reference/h200/coordinates.nc"
    command = [sys.executable, script, notebook, "x.ipynb", f"coordinates={data}", f"output={folder / output}"]
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=HANGS
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    done = run_notebook(folder, "plain")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_notebook_draws_the_same_bytes_whatever_the_user_has_set(drawn: Path, tmp_path: Path) -> None:
    """Kernels, start-up files, backends and a matplotlibrc of the user's, and one in the folder."""
    home = tmp_path / "home"
    for place in (home / ".local/share/jupyter", home / "jupyter"):
        (place / "kernels/python3").mkdir(parents=True)
        spec = {"argv": ["/nonexistent/bin/python"], "display_name": "x", "language": "python"}
        (place / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    (home / "startup.py").write_text("raise SystemExit('a start-up file was read')\n")
    (home / "matplotlibrc").write_text(RC)
    shutil.copy(home / "matplotlibrc", drawn / "matplotlibrc")
    told = run_notebook(
        *(drawn, "told"),
        **{
            "HOME": str(home),
            "MPLBACKEND": "nonsense",
            "MATPLOTLIBRC": str(home),
            "JUPYTER_PATH": str(home / "jupyter"),
        },
        PYTHONSTARTUP=str(home / "startup.py"),
    )
    (drawn / "matplotlibrc").unlink()
    assert told.returncode == 0, told.stderr
    for suffix in ("svg", "png", "csv"):
        assert (drawn / f"told.{suffix}").read_bytes() == (drawn / f"plain.{suffix}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["/dev/null/x", "LONG"])
def test_a_notebook_finds_a_place_for_its_sockets(drawn: Path, place: str) -> None:
    place = place.replace("LONG", str(drawn / ("long" * 30)))
    assert run_notebook(drawn, "elsewhere", TMPDIR=place, HOME="/dev/null/home").returncode == 0


def test_a_place_for_sockets_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "workflow/scripts"))
    import run_notebook as script

    short = Path(f"/tmp/gdn-mup-test-{os.getpid()}")
    short.mkdir()
    monkeypatch.setenv("TMPDIR", str(short))
    with script.scratch_folder() as folder:
        assert folder.parent == short and len(str(folder)) < 80
    short.rmdir()
    monkeypatch.chdir(tmp_path)

    def nowhere(*arguments: object, **more: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(script.tempfile, "TemporaryDirectory", nowhere)
    with pytest.raises(MachineError) as caught, script.scratch_folder():
        pass
    is_said_as(caught.value, "no place for a notebook's sockets")


def test_no_temporary_folder_is_named_with_its_cure() -> None:
    how = ending(FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']"))
    assert how and how.exit_code == 3 and how.line.endswith("; name a folder that can be written in TMPDIR")


# ---- output ----


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("command", [["rules"], ["--help"], ["sweep", "--help"], ["plan", "--study", "x.yaml"]])
def test_output_fits_any_encoding(encoding: str, command: list[str]) -> None:
    done = gdn_mup(*command, PYTHONIOENCODING=encoding)
    assert "Traceback" not in done.stderr and done.returncode == (2 if "plan" in command else 0)
    assert len(done.stdout + done.stderr) > 50


def test_the_last_line_finds_another_way_where_the_log_is_full(tmp_path: Path) -> None:
    other = (tmp_path / "other").open("w+")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gdn_mup", "plan", "--study", "none.yaml"]
        environment = os.environ | {LAST_LINE: str(other.fileno())}
        done = subprocess.run(
            command, stderr=full, env=environment, pass_fds=[other.fileno()], timeout=HANGS, cwd=tmp_path
        )
    assert done.returncode == 2
    assert (tmp_path / "other").read_text().startswith("error: none.yaml: no such study file")


# ---- kernels ----


def test_nothing_to_pack_is_no_success(tmp_path: Path) -> None:
    done = gdn_mup("warm-up", "--pack", str(tmp_path / "k.tar.xz"), TRITON_CACHE_DIR=str(tmp_path / "none"))
    ends_as(done, "no compiled kernels to pack")
    assert not list(tmp_path.iterdir())


def test_no_home_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="TRITON_CACHE_DIR"):
        cache.cache_folder()


# ---- the folder ----

FAKE_PYTHON = """#!/bin/bash
echo "$*" >> "$FAKE_LOG"
if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
"""


@pytest.mark.parametrize("name", ["it's my study", 'a "quoted" one', "a (b) & c; d", "$HOME `x`", "plain"])
def test_an_environment_is_made_in_any_folder(tmp_path: Path, name: str) -> None:
    folder, log = tmp_path / name / "gdn mup", tmp_path / "log"
    folder.mkdir(parents=True)
    for file in ("Makefile", "requirements.lock", "requirements-peers.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    for _ in range(2):
        command = ["make", "environment", f"PYTHON={tmp_path}/python"]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"FAKE_LOG": str(log)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert log.read_text().count("-m pip install") == 3 and (folder / ".venv/.installed").exists()


def test_tables_are_written_the_same_in_any_folder(tmp_path: Path) -> None:
    figure, table = plt.figure(), pd.DataFrame({"a": [1]})
    style.save(figure, table, tmp_path / "it's [x]*" / "f")
    assert len(list((tmp_path / "it's [x]*").iterdir())) == 3
    plt.close(figure)
