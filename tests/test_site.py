"""The site builds without a warning, says what the code says, and needs nothing from elsewhere."""

import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import xarray as xr
from bs4 import BeautifulSoup, Tag
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from workflow_copy import ROOT

from gdn_mup.scaling.exponents import predict
from gdn_mup.scaling.growth import Axes, Growth
from gdn_mup.scaling.rules import PRINCIPAL, RULE_SETS
from gdn_mup.study.claims import CLAIMS, Verdict, judge_all
from gdn_mup.study.datasets import open_dataset, open_jobs
from gdn_mup.study.estimates import signed
from gdn_mup.study.optimum import slope_against_width, transfer
from gdn_mup.study.plan import load_study
from gdn_mup.study.tables import (
    optima,
    printed_optima,
    printed_scaling_rules,
    printed_transfer_metrics,
    scaling_rules,
    transfer_metrics,
    variants,
)
from gdn_mup.study.titles import GROWTH_TITLES, RULE_TITLES

RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹ᐟ", "−0123456789/")  # the pages raise these by HTML
RESULTS = ".md-search-result__article h2"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site. Strict: a broken link or anchor ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def page(site: Path, name: str) -> BeautifulSoup:
    return BeautifulSoup((site / name).read_text("utf-8"), "html.parser")


def tables(page: BeautifulSoup) -> list[list[list[str]]]:
    """The cells of every table of a page, its head first."""
    return [[[cell.text for cell in row.find_all(["th", "td"])] for row in t.find_all("tr")] for t in page("table")]


def evaluated(formula: str, growth: Growth) -> float:
    """The value of `rout / rin`, `1 / √rin` and the like."""
    names = {"rin": growth.fan_in, "rout": growth.fan_out, "m": growth.width, "sqrt": math.sqrt}
    for name in ("rin", "rout", "m"):
        formula = formula.replace(f"√{name}", f"sqrt({name})")
    return float(eval(formula, {}, names))


def test_the_table_of_the_rules_is_the_rule_set(site: Path) -> None:
    rules, table = RULE_SETS["gdn_mup"], tables(page(site, "rules.html"))[0]
    fans = {Axes.BOTH: (3.0, 5.0), Axes.FAN_OUT: (1.0, 5.0), Axes.FAN_IN: (3.0, 1.0), Axes.NONE: (1.0, 1.0)}
    assert table[0] == ["axes that grow", "init std", "AdamW LR", "SGD LR", "Muon LR", "AdamW ε", "AdamW weight decay"]
    assert {row[0] for row in table[1:]} == {axes.value for axes in Axes}
    for axes, *cells in table[1:]:
        growth = Growth(*fans[Axes(axes)], width=4.0)
        row = rules.rows[Axes(axes)]
        adamw, sgd, muon = (row.scaling(growth, optimizer, True) for optimizer in ("adamw", "sgd", "muon"))
        by_muon = cells.pop(3)
        expected = (adamw.init_std, adamw.learning_rate, sgd.learning_rate, adamw.epsilon, adamw.weight_decay)
        assert [evaluated(cell, growth) for cell in cells] == pytest.approx(expected)
        if row.muon_learning_rate is None:
            assert by_muon == "AdamW trains it"
        else:
            assert evaluated(by_muon, growth) == pytest.approx(muon.learning_rate)


def test_all_rule_sets_stand_beside_the_papers(site: Path) -> None:
    expected = printed_scaling_rules(scaling_rules())
    rows = [[str(cell).translate(RAISED) for cell in row] for row in expected.itertuples(index=False)]
    assert [list(expected.columns), *rows] in tables(page(site, "rules.html"))


def test_variants_stand_with_what_they_do_otherwise(site: Path) -> None:
    expected = [[str(cell).translate(RAISED) for cell in row] for row in variants().itertuples(index=False)]
    assert [list(variants().columns), *expected] in tables(page(site, "rules.html"))


def test_rule_sets_that_differ_say_in_what(site: Path) -> None:
    found = tables(page(site, "rules.html"))
    (paper,) = (table for table in found if table[0][3:] == [RULE_TITLES["liu_gu"], RULE_TITLES["gdn_mup"]])
    assert ["W_a, W_b", "SGD learning rate", "larger heads", "m−1/2", "m−1"] in paper
    assert all(ours != theirs for *_, theirs, ours in paper[1:])
    for name in ("sp", "mup", "liu_gu"):  # what the page says in words
        assert not RULE_SETS[name].keeps_decay
        assert all(row.adamw_epsilon(Growth(2, 3, 5)) == 1 for row in RULE_SETS[name].rows.values())


@pytest.mark.parametrize(
    ("position", "optimizer", "growth"), [(0, "adamw", "heads"), (1, "adamw", "head_dim"), (2, "sgd", "head_dim")]
)
def test_predicted_exponents_are_those_of_the_derivation(site: Path, position, optimizer, growth) -> None:
    found = [table for table in tables(page(site, "rules.html")) if table[0][0] == "array"][position]
    assert len(found) == 9
    logits = found[-1]
    for name, cell in zip(PRINCIPAL, logits[2:], strict=True):
        change = predict(name, optimizer, growth).change["logits", -1]
        assert float(cell.replace("−", "-")) == pytest.approx(change, abs=0.01)


def test_every_claim_is_there_with_how_it_is_decided(site: Path) -> None:
    found = next(table for table in tables(page(site, "study.html")) if "decided by" in table[0])
    assert found[1:] == [[claim.id, claim.statement, claim.decided_by.translate(RAISED)] for claim in CLAIMS]


@cache
def evidence(study: str) -> dict[str, xr.Dataset]:
    """The published datasets of a study."""
    return {path.stem: open_dataset(path, path.stem) for path in (ROOT / "results/reference" / study).glob("*.nc")}


@cache
def verdicts(study: str) -> list[Verdict]:
    """What they say."""
    return judge_all(evidence(study))


def test_results_are_the_verdicts_of_the_published_datasets(site: Path) -> None:
    found = page(site, "results.html")
    shown = [row for table in tables(found) if "verdict" in table[0] for row in table[1:] if row[2] == "all"]
    fine = ("C2", "C4", "C8", "C10")  # what h200_fine was run for: told behind h200
    longer = [v for study in ("h200_4x", "h200_4x_sp") for v in verdicts(study) if not v.rules]
    told_first = [v.verdict for v in longer if v.claim in ("C1", "C2") and v.verdict != "not tested"]
    expected = told_first + [
        verdict.verdict
        for claim in CLAIMS
        for study in ("h200", "h200_fine")
        for verdict in verdicts(study)
        if verdict.claim == claim.id and not verdict.rules and (study == "h200" or claim.id in fine)
    ]
    assert [row[3] for row in shown] == expected
    assert len({heading.text.split(".")[0] for heading in found("h2")} & {claim.id for claim in CLAIMS}) == 10
    for study in ("h200", "h200_fine"):
        kept = len(open_jobs(ROOT / f"results/reference/{study}/lr_sweep.nc", "lr_sweep"))
        planned = len(load_study(ROOT / f"config/studies/{study}.yaml").jobs("lr_sweep"))
        assert f"{kept} of {planned} jobs of lr_sweep" in found.text


def test_slopes_with_the_base_width_of_the_finer_study(site: Path) -> None:
    (shown,) = (t for t in tables(page(site, "results.html")) if "slope (octaves per doubling)" in t[0])
    coarse, fine = (evidence(study)["lr_sweep"] for study in ("h200", "h200_fine"))
    growths = {title: name for name, title in GROWTH_TITLES.items()}
    names = {title: name for name, title in RULE_TITLES.items()}
    assert len(shown) == 1 + 2 * coarse.sizes["rules"]
    for growth, rules, slope, _ in shown[1:]:
        base = transfer(fine, growths[growth], "adamw", "gdn_mup").optima[128]
        wider = [transfer(coarse, growths[growth], "adamw", names[rules]).optima[width] for width in (256, 512, 1024)]
        expected = slope_against_width([128, 256, 512, 1024], [base, *wider])
        assert slope.startswith(f"{signed(expected.value)} [{signed(expected.interval.low)}")


def test_the_readme_says_what_the_published_datasets_say() -> None:
    """Every verdict, and every number that has an interval."""
    said = (ROOT / "README.md").read_text("utf-8").partition("## What `h200` finds")[2].partition("\n## ")[0]
    first, _, second = said.partition("`h200_fine` decides")
    claims = {"h200": [claim.id for claim in CLAIMS], "h200_fine": ["C2", "C4", "C8", "C10"]}
    computed = ""
    for study, part in (("h200", first), ("h200_fine", second)):
        rows = dict(re.findall(r"^\| (C\d+) \| ([^|]+) \|", part, flags=re.MULTILINE))
        assert list(rows) == claims[study]
        for name, shown in rows.items():
            found = {v.growth: v.verdict for v in verdicts(study) if v.claim == name and not v.rules}
            assert shown == f"{found['heads']}, {found['head_dim']}", (study, name)
        sweeps = evidence(study)["lr_sweep"]
        printed = printed_optima(optima(sweeps)), printed_transfer_metrics(transfer_metrics(sweeps))
        computed += "".join(table.to_string() for table in printed)
        computed += "".join(verdict.reason for verdict in verdicts(study))
    quoted = re.findall(r"[−+\d.^]+ \[[^\]]+\]", said.replace("\n", " "))
    assert len(quoted) > 30
    for number in quoted:
        assert number.removeprefix("^") in computed, number


def test_every_notebook_has_its_caption(site: Path) -> None:
    headings = {heading.find(string=True) for heading in page(site, "study.html")("h3")}
    drawn = {notebook.stem for notebook in (ROOT / "notebooks").glob("*.ipynb")}
    assert {name for name in drawn if not name.startswith("lr_transfer")} <= headings


def test_the_example_is_run_and_its_table_shown(site: Path) -> None:
    lines = [line for block in page(site, "your_model.html")("pre") for line in block.text.splitlines()]
    assert [line for line in lines if line.startswith("1.gate.weight") and "Linear: fan-in ×4, fan-out ×4" in line]


def test_no_markdown_is_left_as_text(site: Path) -> None:
    """A line that the wrapping of paragraphs lets begin with `#` would be a heading, and its links would be text."""
    for path in site.rglob("*.html"):
        article = page(site, str(path.relative_to(site))).find("article")
        for code in article(["code", "pre"]) if article else ():
            code.decompose()
        text = article.text if article else ""
        assert not [left for left in ("](", "{{", "--8<--", "$$", "**") if left in text], path.name


def test_the_tutorial_is_shown_and_there_to_be_fetched(site: Path) -> None:
    found = page(site, "tutorial.html")
    shown = "".join(block.text for block in found("pre"))
    assert "Scaling.between(Model, base=BASE, target=WIDE)" in shown and "coordinate_check(Model" in shown
    assert [heading for heading in found("h2") if "What to do next" in heading.text]
    (link,) = {anchor["href"] for anchor in found("a") if anchor.get("href", "").endswith(".ipynb")}
    assert (site / link).read_bytes() == (ROOT / "docs/tutorial.ipynb").read_bytes()


def references(page: BeautifulSoup) -> list[str]:
    """What a browser fetches to show a page."""
    fetched = [(tag, name) for tag in page(True) for name in ("src", "srcset", "data", "poster") if tag.get(name)]
    linked: list[tuple[Tag, str]] = [(tag, "href") for tag in page("link")]
    return [tag[name] for tag, name in fetched + linked]


def test_pages_are_shown_without_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 8
    for path in pages:
        for reference in references(page(site, str(path.relative_to(site)))):
            parts = urlsplit(reference)
            assert not parts.scheme and not parts.netloc, f"{path.name} fetches {reference}"
            if path.name != "404.html":  # its links are for the root of a server
                assert (path.parent / unquote(parts.path)).exists(), f"{path.name}: {reference} is not there"
    for path in [*site.rglob("*.css")]:
        assert "url(http" not in path.read_text("utf-8") and "@import" not in path.read_text("utf-8")


@pytest.mark.browser
def test_pages_fit_a_phone_and_the_search_works_from_disk(site: Path, browser) -> None:
    size = browser.get_window_size()
    try:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        for name in ("index", "rules", "your_model", "tutorial", "study", "results", "faq", "reference/scaling"):
            browser.get((site / f"{name}.html").as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, name
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.set_window_size(size["width"], size["height"])
    browser.get((site / "faq.html").as_uri())
    search = WebDriverWait(browser, 60).until(
        lambda found: (box := found.find_element(By.CSS_SELECTOR, ".md-search__input")).is_displayed() and box
    )
    search.send_keys("tied embeddings")

    def hits(found) -> list[str]:
        return [hit.get_attribute("textContent") for hit in found.find_elements(By.CSS_SELECTOR, RESULTS)]

    WebDriverWait(browser, 60).until(lambda found: any("Tied embeddings" in hit for hit in hits(found)))
