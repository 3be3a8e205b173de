"""References of a study file's keys and of the datasets' variables, generated from the code that uses them."""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from gdn_mup.study.datasets import DESCRIPTIONS, JOB_COORDINATES, JOB_VARIABLES
from gdn_mup.study.plan import Study

BEGIN = "<!-- generated from the code by `make reference` -->\n"
END = "<!-- end of the generated part -->"

SECTIONS = (
    ("corpus", "Which text, and how it becomes tokens."),
    ("model", "The Gated DeltaNet at the base width."),
    ("training", "How a member is trained. A sweep or coordinate check may override keys under its own `training`."),
    ("sweeps", "A list: a learning-rate sweep for each growth mode and optimizer."),
    ("coordinate_checks", "A list: a coordinate check for each growth mode and optimizer."),
    (
        "multiplier_checks",
        "A list: models with and without a multiplier √width before the delta rule's output norm.",
    ),
    ("clipping_checks", "A list: learning-rate sweeps under each way to clip gradients."),
    (
        "tunings",
        "A list: a random search over multipliers, the same trials at each width, for each growth mode and optimizer. "
        "`log2_ranges` are the powers of 2 between which a multiplier is drawn, log-uniformly; `[0, 0]`: not tuned.",
    ),
)


def json_schema() -> str:
    """The JSON schema of a study file, for editors that complete and check YAML."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Study.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def markdown_reference() -> str:
    """A table of keys, defaults, allowed values and meanings for each section of a study file."""
    parts = []
    for name, meaning in SECTIONS:
        model = _model_of(Study.model_fields[name].annotation)
        parts.append(f"### `{name}`\n\n{meaning}\n\n| key | default | allowed | meaning |\n|---|---|---|---|")
        parts[-1] += "".join(f"\n{row}" for row in _rows(model, ""))
    return "\n\n".join(parts) + "\n"


def datasets_reference() -> str:
    """For each kind of dataset a table of its variables, and one table of the coordinates, with units and meanings."""
    parts = []
    coordinates: dict[str, None] = dict.fromkeys(JOB_COORDINATES)
    for kind, variables in JOB_VARIABLES.items():
        rows = [f"### `{kind}.nc`\n\n| variable | of each job, by | unit | meaning |\n|---|---|---|---|"]
        for name, dimensions in variables.items():
            coordinates |= dict.fromkeys(dimensions)
            meaning, unit = DESCRIPTIONS[name]
            rows.append(f"| `{name}` | {', '.join(dimensions)} | {unit} | {meaning} |")
        parts.append("\n".join(rows))
    rows = ["### Coordinates\n\n| coordinate | unit | meaning |\n|---|---|---|"]
    rows += [f"| `{name}` | {DESCRIPTIONS[name][1]} | {DESCRIPTIONS[name][0]} |" for name in coordinates]
    return "\n\n".join(["\n".join(rows), *parts]) + "\n"


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    properties = model.model_json_schema()["properties"]
    rows = []
    for name, field in model.model_fields.items():
        nested = _model_of(field.annotation)
        if nested is not None:
            rows += _rows(nested, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default())}`"
        allowed = _allowed(properties[name])
        rows.append(f"| `{prefix}{name}` | {default} | {allowed} | {field.description or ''} |")
    return rows


def _model_of(annotation: Any) -> Any:
    """The settings class inside an annotation such as `tuple[Sweep, ...]`, if there is one."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _allowed(schema: dict[str, Any]) -> str:
    """Values or bounds in words, from a property of the JSON schema."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        inner = _allowed(schema["items"] if "items" in schema else schema["prefixItems"][0])
        return f"list of {inner}" if inner else "list"
    bounds = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}
    words = [text.format(schema[key]) for key, text in bounds.items() if key in schema]
    kinds = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true, false",
        "object": "keys",
    }
    return " ".join([kinds.get(schema.get("type", ""), ""), ", ".join(words)]).strip()


def generated(path: Path) -> str:
    """The generated part of a page."""
    return path.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Rewrite the generated parts of both pages, and the schema: what `make reference` runs."""
    for path, reference in PAGES.items():
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        path.write_text(f"{before}{BEGIN}\n{reference()}\n{END}{after}", encoding="utf-8")
    Path("config/study.schema.json").write_text(json_schema(), encoding="utf-8")


PAGES = {Path("config/README.md"): markdown_reference, Path("results/reference/README.md"): datasets_reference}

if __name__ == "__main__":
    main()
