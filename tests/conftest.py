"""Fixtures that several rooms share."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from _pytest.nodeid import NodeId
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: our kernels are tested without a GPU too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: as many tests run as there are cores

from workflow_copy import ROOT, TINY, WorkflowCopy

from gdn_mup.corpus.build import build_corpus
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.tokens import TokenFile


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files, and the tests of each, in another order")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share what is made for them run one after another, in one process.

    These are the tests on the finished study `smoke`, which some of them change and put back, and those of a file that
    makes something for all of its tests (a fixture of scope `module`).
    """
    if (seed := config.getoption("shuffle")) is not None:
        places: dict[str, float] = defaultdict(Random(seed).random)  # a file's or a test's, drawn as they are asked for
        items.sort(key=lambda item: (places[str(item.path)], places[item.nodeid]))
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        if not item.get_closest_marker("xdist_group"):
            if "smoke" in fixtures:
                item.add_marker(pytest.mark.xdist_group("smoke"))
            elif any(definitions[-1].scope == "module" for definitions in fixtures.values()):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
        mark = item.get_closest_marker("xdist_group")
        if mark and "PYTEST_XDIST_WORKER" in os.environ:
            # xdist tells its scheduler the group at the end of a test's id, by an attribute that pytest 9.2 no longer
            # has: every mark would be ignored (github.com/pytest-dev/pytest-xdist/issues/1386).
            item._id = NodeId.parse(f"{item.nodeid}@{mark.args[0]}")  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests compare bits: one thread everywhere, however many cores the machine has."""
    torch.set_num_threads(1)


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, make)` calls `make` on a folder once in a run of the tests, however many processes it has.

    Whichever asks first makes it, the others wait and read what is there: a folder that a test changes needs a copy.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of the whole run

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / f"made-{name}", shared / f"made-{name}.done"
        with FileLock(shared / f"made-{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one who failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def corpus_folder(made_once: MadeOnce) -> Path:
    """A small corpus of real text: part of the standard library, vocabulary 320."""
    sizes = {"maximum_bytes": 400_000, "tokenizer_sample_bytes": 200_000, "vocabulary_size": 320}
    settings = CorpusSettings(**sizes, validation_fraction=0.2)
    return made_once("corpus", lambda folder: build_corpus(settings, ROOT, folder))


@pytest.fixture(scope="session")
def tiny_corpus(made_once: MadeOnce) -> Path:
    """The corpus of the study `TINY`."""
    return made_once("tiny-corpus", lambda folder: build_corpus(CorpusSettings(**TINY["corpus"]), ROOT, folder))


@pytest.fixture(scope="session")
def tokens(corpus_folder: Path) -> TokenFile:
    """Its training tokens."""
    return TokenFile.open(corpus_folder / "train.tokens")


@pytest.fixture(scope="session")
def validation(corpus_folder: Path) -> TokenFile:
    """Its held-out tokens."""
    return TokenFile.open(corpus_folder / "validation.tokens")


@pytest.fixture(scope="session")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> WorkflowCopy:
    """A copy of the workflow in which nothing has run: for dry runs."""
    return WorkflowCopy(tmp_path_factory.mktemp("workflow") / "copy")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> WorkflowCopy:
    """A copy of the workflow in which the study `smoke` has run from text to report."""
    copy = WorkflowCopy(tmp_path_factory.mktemp("smoke") / "copy")
    run = copy.snakemake("--config", "study=smoke", "--cores", "2")
    logs = "\n".join(path.read_text() for path in Path(copy.folder).glob("results/smoke/logs/**/*.log"))
    assert run.returncode == 0, run.stdout + logs
    return copy


BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # self-contained: nothing may come from elsewhere
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """Headless Chromium without a network."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian, Ubuntu: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*BROWSER_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()
