"""The report, opened from disk in a real browser."""

import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from workflow_copy import WorkflowCopy

pytestmark = [pytest.mark.workflow, pytest.mark.browser]

FLAGS = (
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian, Ubuntu: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def report(browser, smoke: WorkflowCopy):
    """The browser on the report's first page."""
    browser.get((smoke.folder / "results/smoke/report.html").as_uri())
    return browser


def click(browser, text: str) -> None:
    """Click on the first visible element with exactly that text, as soon as there is one."""
    path = f"//*[normalize-space(text())='{text}']"

    def visible(_):
        return next((e for e in browser.find_elements(By.XPATH, path) if e.is_displayed()), None)

    WebDriverWait(browser, 20).until(visible).click()


def click_icon(browser, label: str, icon: str) -> None:
    """Click on an icon (`eye`: show it; `information-circle`: describe it) in the row with that label."""
    link = f"//tr[td[normalize-space(text())='{label}']]//a[@iconname='{icon}']"
    WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.XPATH, link))[0].click()


def wait_for_text(browser, text: str) -> None:
    """Return when the page shows that text; fail after a while."""
    WebDriverWait(browser, 20).until(lambda _: text in browser.find_element(By.TAG_NAME, "body").text)


def test_the_first_page_says_what_this_is(report):
    wait_for_text(report, "How the hyperparameters of Gated Delta Networks scale with width")
    wait_for_text(report, "config/studies/smoke.yaml")


def test_clicking_through_to_a_figure_shows_it(report):
    click(report, "Figures")
    click_icon(report, "Learning-rate transfer, AdamW", "eye")
    drawn = """
        return [...document.images].some(image => image.src.startsWith("data:image/svg")
            && image.complete && image.naturalWidth > 100 && image.getBoundingClientRect().width > 100)
    """
    WebDriverWait(report, 20).until(lambda _: report.execute_script(drawn))
    click_icon(report, "Learning-rate transfer, AdamW", "information-circle")
    wait_for_text(report, "Does the best learning rate move when the model grows?")


def test_clicking_through_to_a_table_shows_it(report, smoke: WorkflowCopy):
    click(report, "Tables")
    click_icon(report, "Verdicts", "eye")
    WebDriverWait(report, 20).until(lambda _: report.find_elements(By.TAG_NAME, "iframe"))
    report.switch_to.frame(report.find_element(By.TAG_NAME, "iframe"))
    header = WebDriverWait(report, 20).until(lambda _: report.find_elements(By.XPATH, "//table//th"))
    markdown = Path(smoke.folder / "results/smoke/tables/verdicts.md").read_text()
    assert all(cell.text in markdown for cell in header)
    report.switch_to.default_content()
