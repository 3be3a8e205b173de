"""Fixtures that several rooms share."""

import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: our kernels are tested without a GPU too

from workflow_copy import ROOT, WorkflowCopy

from gdn_mup.corpus.build import build_corpus
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.corpus.tokens import TokenFile


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests compare bits: one thread everywhere, however many cores the machine has."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of real text: part of the standard library, vocabulary 320."""
    folder = tmp_path_factory.mktemp("corpus")
    sizes = {"maximum_bytes": 400_000, "tokenizer_sample_bytes": 200_000, "vocabulary_size": 320}
    settings = CorpusSettings(**sizes, validation_fraction=0.2)
    build_corpus(settings, ROOT, folder)
    return folder


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
