"""Tables and formulae of the site, made while mkdocs builds it.

`{{ name argument … }}` in a page becomes what the function `name` of `PARTS` returns: tables come from the rule
sets, predictions and claims that the package itself uses, so that a page cannot say anything else. TeX between dollar
signs becomes a drawing (SVG), which needs no script, and no font of the reader's: without a font for mathematics,
browsers set MathML's indices on the line.
"""

import html
import json
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import typer.main
import xarray as xr
from jinja2 import Template
from mkdocs.exceptions import PluginError
from ziamath import Latex, config

from gdn_mup.cli import app
from gdn_mup.scaling.exponents import OUTSIDE_BLOCKS, predict
from gdn_mup.scaling.growth import Axes
from gdn_mup.scaling.rules import PRINCIPAL, RULE_SETS, Power
from gdn_mup.study import tables
from gdn_mup.study.claims import CLAIMS, verdict_table
from gdn_mup.study.datasets import JOB_VARIABLES, open_dataset
from gdn_mup.study.estimates import signed as rounded
from gdn_mup.study.optimum import slope_against_width, transfer_regret, transfers
from gdn_mup.study.plan import SECTIONS, load_study
from gdn_mup.study.reference import markdown_reference
from gdn_mup.study.tables import optima, printed_optima, printed_scaling_rules, printed_verdicts, scaling_rules
from gdn_mup.study.titles import GROWTH_TITLES, RULE_TITLES

FONT_SIZE = 16.0  # only proportions matter: drawings are scaled with the text
config.svg2 = False  # no ids, which would be there several times on a page
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹ᐟ", "−0123456789/")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Put the generated parts where the page asks for them."""

    def part(request: re.Match[str]) -> str:
        name, *arguments = request[1].split()
        if name == "output":
            return output_of(page.file.src_path, markdown[: request.start()])
        if name not in PARTS:
            raise PluginError(f"{page.file.src_path}: no part {name!r}; there are: {', '.join(PARTS)}")
        return PARTS[name](*arguments)

    return re.sub(r"\{\{ (.+?) \}\}", part, markdown)


def on_page_content(content: str, **_) -> str:
    """TeX as drawings, as large and as dark as the text around them."""

    def formula(found: re.Match[str]) -> str:
        block, tex = found[1] == "div", html.unescape(found[2])
        drawing = Latex(tex, size=FONT_SIZE, inline=not block, color="currentColor")
        svg = re.sub(
            r'(width|height)="([\d.]+)"',
            lambda size: f'{size[1]}="{float(size[2]) / FONT_SIZE:.3f}em"',
            drawing.svg(),
            count=2,
        )
        style = f"vertical-align: {drawing.getyofst() / FONT_SIZE:.3f}em"
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(tex)}" style="{style}"', 1)
        return f'<div class="formula">{svg}</div>' if block else f'<span class="formula">{svg}{found[3]}</span>'

    pattern = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([.,;:)]*)'
    return re.sub(pattern, formula, content, flags=re.DOTALL)


def markdown_table(table: pd.DataFrame) -> str:
    """A table whose exponents are set as such."""
    text = table.astype(str).to_markdown(index=False, disable_numparse=True)
    return re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹ᐟ]+", lambda raised: f"<sup>{raised[0].translate(RAISED)}</sup>", text)


def rule_set(name: str) -> str:
    """The rows of a rule set, as powers of the growth of fan-in, fan-out and width."""
    rules = RULE_SETS[name]
    by = "axes that grow" if Axes.BOTH in rules.rows else "parameters"
    rows = []
    for key, row in rules.rows.items():
        decays = Power(*(-exponent for exponent in row.adamw_learning_rate)) if rules.keeps_decay else Power()
        rows.append(
            {
                by: key.value,
                "init std": power(row.init_std),
                "AdamW LR": power(row.adamw_learning_rate),
                "SGD LR": power(row.sgd_learning_rate),
                "Muon LR": power(row.muon_learning_rate) if row.muon_learning_rate else "AdamW trains it",
                "AdamW ε": power(row.adamw_epsilon),
                "AdamW weight decay": power(decays),
            }
        )
    return markdown_table(pd.DataFrame(rows))


def power(exponents: Power) -> str:
    """`r_out / r_in`, in HTML."""
    names = ("r<sub>in</sub>", "r<sub>out</sub>", "m")
    factors = [(name, exponent) for name, exponent in zip(names, exponents, strict=True) if exponent]
    words = {0.5: "√{}", 1.0: "{}"}
    above = [words[exponent].format(name) for name, exponent in factors if exponent > 0]
    below = [words[-exponent].format(name) for name, exponent in factors if exponent < 0]
    return " ".join(above or ["1"]) + "".join(f" / {word}" for word in below)


def all_rules() -> str:
    """Every rule set and the paper's own rules, side by side."""
    return markdown_table(printed_scaling_rules(scaling_rules()))


def variants() -> str:
    """What each variant multiplies otherwise than the rule set that it departs from."""
    return markdown_table(tables.variants())


def differences(other: str) -> str:
    """Inits and learning rates that a rule set multiplies otherwise than `gdn_mup`."""
    table = scaling_rules()
    uniform = table.multiplier.isin(["adamw_epsilon", "adamw_weight_decay", "output"])
    table = table[(table[other] != table.gdn_mup) & ~uniform]
    printed = printed_scaling_rules(table)
    return markdown_table(
        printed[["parameters", "multiplier", "growth by", RULE_TITLES[other], RULE_TITLES["gdn_mup"]]]
    )


QUANTITIES = {
    "alpha_preactivation": "W_a x + dt_bias",
    "beta_preactivation": "W_b x",
    "state": "state S",
    "o": "o = S q",
    "mixer_output": "the mixer's output",
    "mlp_output": "the MLP's output",
    "residual": "residual stream",
    "logits": "logits",
}


def exponents(optimizer: str, growth: str) -> str:
    """Predicted width exponents under `gdn_mup` at init, and of the first change under every rule set."""
    found = {name: predict(name, optimizer, growth) for name in PRINCIPAL}
    rows = []
    for name, title in QUANTITIES.items():
        key = (name, OUTSIDE_BLOCKS if name == "logits" else 1)
        changes = {f"change, {RULE_TITLES[rules]}": signed(found[rules].change[key]) for rules in PRINCIPAL}
        rows.append(
            {"array": title, f"at init, {RULE_TITLES['gdn_mup']}": signed(found["gdn_mup"].rms[key]), **changes}
        )
    return markdown_table(pd.DataFrame(rows))


def signed(exponent: float) -> str:
    """`−½` is printed −0.5, nothing grows or falls is 0."""
    return f"{exponent:+.3g}".replace("-", "−") if exponent else "0"


def claims() -> str:
    """Every claim and how it is decided."""
    return markdown_table(
        pd.DataFrame([{"": claim.id, "claim": claim.statement, "decided by": claim.decided_by} for claim in CLAIMS])
    )


def finding(claim: str) -> str:
    """What study `laptop` found on a claim: its row of the README's table."""
    row = re.search(rf"^\| {claim}\. .*$", Path("README.md").read_text("utf-8"), flags=re.MULTILINE)
    if not row:
        raise PluginError(f"README.md has no finding on {claim}")
    _, statement, verdict, why, _ = (cell.strip() for cell in row[0].split("|"))
    return f"{statement}: *{verdict}*. {why[0].upper()}{why[1:]}."


@cache
def evidence(study: str) -> Mapping[str, xr.Dataset]:
    """The published datasets of a study, by kind."""
    kinds = [kind for kind in JOB_VARIABLES if Path(f"results/reference/{study}/{kind}.nc").is_file()]
    return {kind: open_dataset(f"results/reference/{study}/{kind}.nc", kind) for kind in kinds}


def published(study: str) -> str:
    """How much of a study is published."""
    counts = []
    for kind, dataset in evidence(study).items():
        jobs, missing = int(dataset.seconds.notnull().sum()), len(json.loads(dataset.attrs["missing_jobs"]))
        counts.append(f"{jobs} of {jobs + missing} jobs of `{kind}`")
    planned = load_study(f"config/studies/{study}.yaml")
    counts += [f"none of `{kind}`" for kind in SECTIONS if planned.jobs(kind) and kind not in evidence(study)]
    return f"Of `{study}` are published so far: {', '.join(counts)}."


@cache
def verdicts(study: str) -> pd.DataFrame:
    """The printed verdicts of a study's published datasets, with the claim's name alone."""
    table = printed_verdicts(verdict_table(evidence(study)))
    return table.assign(claim=table.claim.str.split(".").str[0].replace("", None).ffill())


def verdict(study: str, claim: str) -> str:
    """What a study's published datasets say on a claim, and on which of its rule sets."""
    table = verdicts(study)
    silent = (table.rules != "all") & (table.verdict == "not tested")
    return markdown_table(table[(table.claim == claim) & ~silent].drop(columns="claim"))


def best_losses(study: str) -> str:
    """Optima and best losses at the widest width of a study's published sweeps, against those of other rule sets."""
    table = optima(evidence(study)["lr_sweep"])
    printed = printed_optima(table[table.width == table.width.max()])
    return markdown_table(printed.drop(columns=["width", "seeds"]))


def with_base_of(study: str, finer: str, optimizer: str) -> str:
    """Slopes and regrets of a study whose base width's optimum is the one that a finer study found, all seeds together.

    The base width's model is the same one under every rule set, so that this holds for those that were not run finer.
    """
    finer_sweeps = transfers(evidence(finer)["lr_sweep"], optimizer)
    bases = {sweep.growth: sweep.optima[sweep.base_width] for sweep in finer_sweeps}
    rows = []
    for sweep in transfers(evidence(study)["lr_sweep"], optimizer):
        base = bases[sweep.growth]
        found = list((sweep.optima | {sweep.base_width: base}).values())
        slope, regret = slope_against_width(sweep.widths, found), transfer_regret(found[-1], base)
        low, high = map(rounded, slope.interval)
        rows.append(
            {
                "growth by": GROWTH_TITLES[sweep.growth],
                "rules": RULE_TITLES[sweep.rules],
                "slope (octaves per doubling)": f"{rounded(slope.value)} [{low}, {high}]",
                f"regret at width {sweep.widths[-1]} (nats/token)": "{:.3f} [{:.3f}, {:.3f}]".format(
                    regret.value, *regret.interval
                ),
            }
        )
    return markdown_table(pd.DataFrame(rows))


def commands() -> str:
    """Every command with the first paragraph of its help."""
    found = typer.main.get_command(app).commands
    rows = [{"command": f"`gdn-mup {name}`", "": found[name].help.split("\n\n")[0]} for name in sorted(found)]
    return markdown_table(pd.DataFrame(rows))


def captions() -> str:
    """Every figure and table with the caption that it has in the report."""
    regime = "(Here: tokens a run, and per parameter, of the study.)"
    about = SimpleNamespace(wildcards=SimpleNamespace(optimizer="adamw"), params=SimpleNamespace(regime=regime))
    files = [path for path in sorted(Path("workflow/report").glob("*.rst")) if path.stem != "workflow"]
    return "\n\n".join(f"### {path.stem}\n\n{Template(path.read_text()).render(snakemake=about)}" for path in files)


def output_of(page: str, before: str) -> str:
    """What the Python blocks of a page print, run one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```$", before, flags=re.MULTILINE | re.DOTALL)
    with redirect_stdout(StringIO()) as printed:
        exec(compile("".join(blocks), page, "exec"), {"__name__": page})
    return f"```text\n{printed.getvalue()}```"


def notebook(name: str) -> str:
    """The cells of a notebook beside the pages, as they are kept: without outputs."""
    cells = json.loads(Path("docs", name).read_text("utf-8"))["cells"]
    shown = {"markdown": "{}", "code": "```python\n{}\n```"}
    return "\n\n".join(shown[cell["cell_type"]].format("".join(cell["source"])) for cell in cells)


PARTS = {
    function.__name__: function
    for function in (
        rule_set,
        all_rules,
        differences,
        variants,
        exponents,
        finding,
        published,
        verdict,
        best_losses,
        with_base_of,
        captions,
        claims,
        commands,
        markdown_reference,
        notebook,
    )
}
