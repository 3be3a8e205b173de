"""The report, opened from disk in a real browser."""

from collections.abc import Callable
from pathlib import Path

import pytest
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from workflow_copy import WorkflowCopy

pytestmark = [pytest.mark.workflow, pytest.mark.browser]


@pytest.fixture
def report(browser, smoke: WorkflowCopy):
    """The browser on the report's first page."""
    browser.get((smoke.folder / "results/smoke/report.html").as_uri())
    return browser


WAIT = 60  # seconds; the page is there at once, unless other tests keep the machine busy


def named(text: str) -> str:
    """XPath of the elements with exactly that text."""
    return f"//*[normalize-space(text())='{text}']"


def icon(label: str, name: str) -> str:
    """XPath of an icon (`eye`: show it; `information-circle`: describe it) in the row with that label."""
    return f"//tr[td[normalize-space(text())='{label}']]//a[@iconname='{name}']"


def click(browser, path: str, until: Callable[[], object]) -> None:
    """Click on the first visible element of that path until what the click is for has come about.

    The page slides its panels into place: a click on a busy machine may arrive where the element no longer is.
    """

    def done(_) -> bool:
        if until():
            return True
        for element in browser.find_elements(By.XPATH, path):
            if element.is_displayed():
                element.click()
                break
        return bool(until())

    moving = (ElementClickInterceptedException, StaleElementReferenceException)
    WebDriverWait(browser, WAIT, poll_frequency=1, ignored_exceptions=moving).until(done)


def shows(browser, text: str) -> bool:
    """Whether the page shows that text."""
    return text in browser.find_element(By.TAG_NAME, "body").text


def wait_for_text(browser, text: str) -> None:
    """Return when the page shows that text; fail after a while."""
    WebDriverWait(browser, WAIT).until(lambda _: shows(browser, text))


def test_the_first_page_says_what_this_is(report):
    wait_for_text(report, "How the hyperparameters of Gated Delta Networks scale with width")
    wait_for_text(report, "config/studies/smoke.yaml")


def test_clicking_through_to_a_figure_shows_it(report):
    drawn = """
        return [...document.images].some(image => image.src.startsWith("data:image/svg")
            && image.complete && image.naturalWidth > 100 && image.getBoundingClientRect().width > 100)
    """
    figure, question = "Learning-rate transfer, AdamW", "Does the best learning rate move when the model grows?"
    click(report, named("Figures"), until=lambda: report.find_elements(By.XPATH, icon(figure, "eye")))
    click(report, icon(figure, "eye"), until=lambda: report.execute_script(drawn))
    assert not shows(report, question)
    click(report, icon(figure, "information-circle"), until=lambda: shows(report, question))


def test_clicking_through_to_a_table_shows_it(report, smoke: WorkflowCopy):
    click(report, named("Tables"), until=lambda: report.find_elements(By.XPATH, icon("Verdicts", "eye")))
    click(report, icon("Verdicts", "eye"), until=lambda: report.find_elements(By.TAG_NAME, "iframe"))
    report.switch_to.frame(report.find_element(By.TAG_NAME, "iframe"))
    header = WebDriverWait(report, WAIT).until(lambda _: report.find_elements(By.XPATH, "//table//th"))
    markdown = Path(smoke.folder / "results/smoke/tables/verdicts.md").read_text()
    assert all(cell.text in markdown for cell in header)
    report.switch_to.default_content()
