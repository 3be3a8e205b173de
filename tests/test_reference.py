"""The reference of the configuration is what the settings classes say."""

import json

from workflow_copy import ROOT

from gdn_mup.study.reference import BEGIN, END, json_schema, markdown_reference


def test_config_readme_is_up_to_date() -> None:
    readme = (ROOT / "config/README.md").read_text(encoding="utf-8")
    generated = readme.split(BEGIN)[1].split(END)[0]
    assert generated.strip() == markdown_reference().strip(), "run `make reference`"


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
