"""The references of settings and datasets are what the code says."""

import json
from pathlib import Path

import pytest
from workflow_copy import ROOT

from gdn_mup.study.reference import PAGES, generated, json_schema


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_generated_pages_are_up_to_date(page: Path) -> None:
    assert generated(ROOT / page) == PAGES[page]().strip(), "run `make reference`"


def test_schema_is_up_to_date() -> None:
    assert (ROOT / "config/study.schema.json").read_text(encoding="utf-8") == json_schema(), "run `make reference`"


def test_every_key_is_explained() -> None:
    definitions = json.loads(json_schema())["$defs"]
    silent = [
        f"{name}.{key}"
        for name, definition in definitions.items()
        for key, value in definition["properties"].items()
        if "description" not in value and "$ref" not in value
    ]
    assert not silent
