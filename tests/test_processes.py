"""The tests' own processes: what is grouped stays in one, what is made once is made once."""

import os
from pathlib import Path

import pytest
from conftest import MadeOnce


@pytest.mark.xdist_group("together")
def test_a_group_reaches_the_scheduler(request: pytest.FixtureRequest) -> None:
    """At the end of a test's id. Without it xdist would spread the group, and say nothing."""
    assert request.node.nodeid.endswith("@together") == ("PYTEST_XDIST_WORKER" in os.environ)


@pytest.fixture(scope="module")
def of_this_file() -> int:
    return os.getpid()


def test_what_a_file_makes_groups_its_tests(request: pytest.FixtureRequest, of_this_file: int) -> None:
    assert request.node.get_closest_marker("xdist_group").args == ("test_processes",)


def test_what_is_made_once_is_made_again_only_if_it_failed(made_once: MadeOnce) -> None:
    calls = []

    def make(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "begun").touch()
        calls.append(folder)
        if len(calls) == 1:
            raise OSError("the first time")

    name = f"made-by-{os.getpid()}"
    with pytest.raises(OSError, match="the first time"):
        made_once(name, make)
    assert made_once(name, make) == made_once(name, make) == calls[-1] and len(calls) == 2
