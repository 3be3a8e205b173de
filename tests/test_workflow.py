"""The chain from text to report: what it plans, what it makes, and that it makes nothing twice."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import xarray as xr
import yaml
from command_line import gdn_mup
from workflow_copy import ROOT, WorkflowCopy, job_counts

from gdn_mup.study.datasets import collect, open_dataset, open_jobs
from gdn_mup.study.plan import load_study

PUBLISHED = sorted({path.parent.name for path in (ROOT / "results/reference").glob("*/*.nc")})
REDRAWN = ("h200", "h200_fine", "h200_4x_sp")  # all kinds; a finer grid; SP alone
STUDIES = sorted(path.stem for path in (ROOT / "config/studies").glob("*.yaml"))
FIGURES = {
    *("coordinate_check", "gate_dynamics", "predicted_exponents", "gate_gradients", "norm_epsilon", "clipping"),
    *("lr_transfer_adamw", "lr_transfer_sgd", "optimum_vs_width", "loss_vs_width", "training_curves"),
    *("growth_modes", "published_losses", "base_width_tuning", "transfer_over_training", "clipped_updates"),
}
TABLES = {"scaling_rules", "optima", "transfer_metrics", "verdicts", "cost"}


def figures(study: str) -> set[str]:
    """The figures that a study asks for: one of them needs learning-rate sweeps in both growth modes."""
    growths = {sweep.growth for sweep in load_study(ROOT / f"config/studies/{study}.yaml").sweeps}
    return FIGURES if len(growths) > 1 else FIGURES - {"growth_modes"}


def parameters(notebook: Path) -> dict[str, str]:
    """Name and default of everything that a notebook's parameters cell assigns, in its order."""
    cells = nbformat.read(notebook, as_version=4).cells
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    assignments = (node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


@pytest.mark.parametrize("study", STUDIES)
def test_a_dry_run_plans_every_job_of_the_study(workflow: WorkflowCopy, study: str):
    planned = workflow.planned("--config", f"study={study}")
    plan = load_study(ROOT / f"config/studies/{study}.yaml")
    assert planned["corpus"] == planned["report_html"] == 1
    assert planned["fetch_packages"] == (plan.corpus.source == "pypi")
    assert planned["lr_sweep"] == len(plan.jobs("lr_sweep"))
    assert planned["coordinate_check"] == len(plan.jobs("coordinates"))
    assert planned["multiplier"] == len(plan.jobs("multiplier"))
    assert planned["clipping"] == len(plan.jobs("clipping"))
    assert planned["tuning"] == len(plan.jobs("tuning"))
    assert planned["figure_lr_transfer"] == len({sweep.optimizer for sweep in plan.sweeps})
    assert sum(n for rule, n in planned.items() if rule.startswith("table_")) == len(TABLES)


def test_jobs_that_were_run_by_hand_are_taken_as_they_are(tmp_path: Path):
    """Their files, put in their place, are newer than the corpus that they were trained on."""
    workflow = WorkflowCopy(tmp_path / "workflow")
    results = workflow.folder / "results/h200_fine"
    (results / "corpus").mkdir(parents=True)
    for name in ("train.tokens", "train.json", "validation.tokens", "validation.json", "tokenizer.json"):
        (results / "corpus" / name).touch()
    gdn_mup("extract", workflow.folder / "results/reference/h200_fine/lr_sweep.nc", "--output", results)
    planned = workflow.planned("--config", "study=h200_fine")
    there = len(list(results.rglob("*.nc")))
    assert planned["lr_sweep"] == len(load_study(ROOT / "config/studies/h200_fine.yaml").jobs("lr_sweep")) - there
    assert there > 50 and "corpus" not in planned


def test_one_figure_needs_only_its_own_dataset(workflow: WorkflowCopy):
    planned = workflow.planned("results/laptop/figures/coordinate_check.svg")
    assert set(planned) == {"corpus", "coordinate_check", "collect_coordinates", "figure_coordinate_check"}
    planned = workflow.planned("results/laptop/figures/norm_epsilon.svg")
    assert set(planned) == {"corpus", "multiplier", "collect_multiplier", "figure_norm_epsilon"}
    planned = workflow.planned("results/laptop/figures/clipping.svg")
    assert set(planned) == {"corpus", "clipping", "collect_clipping", "figure_clipping"}


def test_a_study_without_sgd_asks_for_no_sgd_figure(workflow: WorkflowCopy):
    study = yaml.safe_load((workflow.folder / "config/studies/smoke.yaml").read_text())
    study["sweeps"] = [sweep for sweep in study["sweeps"] if sweep["optimizer"] == "adamw"]
    study["coordinate_checks"] = study["multiplier_checks"] = study["clipping_checks"] = study["tunings"] = []
    (workflow.folder / "config/studies/adamw_only.yaml").write_text(yaml.safe_dump(study))
    planned = workflow.planned("--config", "study=adamw_only")
    assert planned["figure_lr_transfer"] == 1
    assert planned["coordinate_check"] == planned["figure_coordinate_check"] == 0
    assert planned["multiplier"] == planned["figure_norm_epsilon"] == 0
    assert planned["clipping"] == planned["figure_clipping"] == 0
    assert planned["figure_growth_modes"] == 1
    assert planned["tuning"] == planned["figure_base_width_tuning"] == 0
    assert "lr_transfer_sgd" not in workflow.snakemake("-n", "--config", "study=adamw_only").stdout


def test_growth_modes_are_compared_where_both_were_swept(workflow: WorkflowCopy):
    study = yaml.safe_load((workflow.folder / "config/studies/smoke.yaml").read_text())
    study["sweeps"] = [
        sweep for sweep in study["sweeps"] if (sweep["growth"], sweep["optimizer"]) != ("heads", "adamw")
    ]
    (workflow.folder / "config/studies/one_each.yaml").write_text(yaml.safe_dump(study))
    planned = workflow.planned("--config", "study=one_each")
    assert planned["figure_loss_vs_width"] == planned["figure_published_losses"] == 1
    assert planned["figure_growth_modes"] == 0


def test_transfer_over_training_needs_more_than_one_evaluation(workflow: WorkflowCopy):
    study = yaml.safe_load((workflow.folder / "config/studies/smoke.yaml").read_text())
    study["training"]["evaluate_every"] = study["training"]["steps"]
    (workflow.folder / "config/studies/once.yaml").write_text(yaml.safe_dump(study))
    planned = workflow.planned("--config", "study=once")
    assert planned["figure_training_curves"] == 1
    assert planned["figure_transfer_over_training"] == 0


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (["--config", "study=smoke", "device=gpu"], "config: device: 'gpu': use auto, cpu, cuda or, for"),
        (
            ["--profile", "workflow/profiles/slurm", "--config", "study=smoke", "device=auto"],
            "config: device: 'auto': jobs run on other machines than this one; use cuda or cpu",
        ),
        (["--config", "study=nowhere"], "config/studies/nowhere.yaml: no such study file; there are: "),
        (["--config", "study=smoke", "runs=reference"], "config: runs: no datasets of study smoke are published in "),
        (["--config", "runs=theirs"], "config: runs: 'theirs': use own or reference"),
        (["--config", "study=misspelt"], "config/studies/misspelt.yaml: sweep: unknown key; "),
        (["results/misspelt/report.html"], "config/studies/misspelt.yaml: sweep: unknown key; "),
        (["--config", "study=smoke", "devise=cpu"], "config: devise: unknown key; use study, device or runs"),
        (["results/smoke/jobs/lr_sweep/heads_adamw_width48_seed0.nc"], "the study has no lr_sweep job growth=heads"),
    ],
)
def test_bad_input_is_one_line(workflow: WorkflowCopy, target: list[str], says: str):
    (workflow.folder / "config/studies/misspelt.yaml").write_text("sweep: []\n")
    run = workflow.snakemake("-n", *target)
    assert run.returncode == 2
    errors = [line for line in run.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {says}")
    assert "Traceback" not in run.stdout


def test_the_default_profile_is_found_and_leaves_a_users_profile_alone(workflow: WorkflowCopy):
    assert "Using workflow specific profile profiles/default" in workflow.snakemake("-n").stdout
    profile = yaml.safe_load((workflow.folder / "workflow/profiles/default/config.yaml").read_text())
    assert not {"executor", "default-resources", "cores", "jobs"} & set(profile)


def test_the_device_reaches_the_jobs(workflow: WorkflowCopy):
    job = "results/smoke/jobs/lr_sweep/heads_adamw_width32_seed0.nc"
    run = workflow.snakemake("-n", "--printshellcmds", "--config", "study=smoke", "device=2xcuda", "--", job)
    assert "--device 2xcuda --output" in run.stdout


def test_every_rule_is_fully_dressed():
    directives = ("log", "benchmark", "message")
    inherited = ("threads", "resources", "conda", "shell")
    for path in sorted((ROOT / "workflow/rules").glob("*.smk")):
        blocks = re.split(r"^(?=rule |use rule )", path.read_text(), flags=re.MULTILINE)[1:]
        for block in blocks:
            wanted = directives if block.startswith("use rule") else directives + inherited
            missing = [word for word in wanted if not re.search(rf"^    {word}:", block, flags=re.MULTILINE)]
            assert not missing, f"{path.name}: {block.splitlines()[0]} lacks {missing}"


def test_notebooks_are_given_exactly_the_parameters_that_they_name(workflow: WorkflowCopy):
    run = workflow.snakemake("-n", "--printshellcmds", "--config", "study=laptop")
    commands = re.findall(r"run_notebook\.py (notebooks/\S+) \S+ (.*?) > ", run.stdout)
    assert {Path(notebook).stem for notebook, _ in commands} == figures("laptop") | TABLES
    for notebook, arguments in commands:
        passed = [tuple(argument.split("=", 1)) for argument in arguments.split()]
        assert passed == list(parameters(ROOT / notebook).items()), notebook


def test_intervals_stay_on_one_line_in_a_table_page(tmp_path: Path):
    (tmp_path / "table.md").write_text("| slope | why |\n|---|---|\n| −0.87 [−1.01, −0.73] | it falls <b> |\n", "utf-8")
    script = ROOT / "workflow/scripts/table_page.py"
    subprocess.run([sys.executable, script, tmp_path / "table.md", tmp_path / "table.html"], check=True)
    page = (tmp_path / "table.html").read_text("utf-8")
    assert "−0.87\N{NO-BREAK SPACE}[−1.01,\N{NO-BREAK SPACE}−0.73]" in page
    assert "it falls &lt;b&gt;" in page


def test_a_notebook_that_fails_fails_its_job(workflow: WorkflowCopy):
    broken = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("output = ''", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("raise RuntimeError(output)"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(broken, workflow.folder / "broken.ipynb")
    run = subprocess.run(
        [sys.executable, "workflow/scripts/run_notebook.py", "broken.ipynb", "executed.ipynb", "output=here"],
        cwd=workflow.folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "RuntimeError: here" in run.stderr


@pytest.mark.workflow
def test_smoke_makes_everything(smoke: WorkflowCopy):
    results = smoke.folder / "results/smoke"
    expected = {f"figures/{figure}.{suffix}" for figure in FIGURES for suffix in ("svg", "png", "csv")}
    expected |= {f"tables/{table}.{suffix}" for table in TABLES for suffix in ("csv", "md", "tex", "html")}
    expected |= {f"notebooks/{name}.ipynb" for name in FIGURES | TABLES} | {"report.html"}
    assert [name for name in sorted(expected) if not (results / name).stat().st_size] == []


@pytest.mark.slow
@pytest.mark.workflow
@pytest.mark.parametrize("study", REDRAWN)
def test_published_datasets_are_redrawn_without_a_job(workflow: WorkflowCopy, study: str):
    run = workflow.snakemake("--config", f"study={study}", "runs=reference", "--cores", "2")
    assert run.returncode == 0, run.stdout
    counts, results = job_counts(run.stdout), workflow.folder / "results" / study
    assert not {"corpus", "fetch_packages", "lr_sweep", "coordinate_check"} & set(counts)
    assert counts["published_dataset"] == len(list((ROOT / "results/reference" / study).glob("*.nc")))
    drawn = {path.stem for path in (results / "figures").glob("*.png")}
    optimizers = {sweep.optimizer for sweep in load_study(ROOT / f"config/studies/{study}.yaml").sweeps}
    assert {*(f"lr_transfer_{name}" for name in optimizers), "optimum_vs_width", "loss_vs_width"} <= drawn
    assert ("norm_epsilon" in drawn) == (ROOT / f"results/reference/{study}/multiplier.nc").is_file()
    assert {path.stem for path in (results / "tables").glob("*.csv")} == TABLES
    assert (results / "report.html").stat().st_size


@pytest.mark.workflow
def test_a_published_study_without_its_base_width_is_refused(workflow: WorkflowCopy):
    run = workflow.snakemake("-n", "--config", "study=h200_decay_0", "runs=reference")
    assert run.returncode == 2
    assert (
        "error: results/reference/h200_decay_0/lr_sweep.nc: nothing was run at the base width (128) yet" in run.stdout
    )


@pytest.mark.slow
@pytest.mark.workflow
@pytest.mark.parametrize("study", PUBLISHED)
def test_published_datasets_hold_whole_jobs(study: str):
    """Of the settings that the study's file has now; collected again they are the dataset."""
    plan = load_study(ROOT / f"config/studies/{study}.yaml")
    for path in (ROOT / "results/reference" / study).glob("*.nc"):
        published = open_dataset(path, path.stem)
        missing = json.loads(published.attrs["missing_jobs"])
        assert len(open_jobs(path, path.stem)) + len(missing) == len(plan.jobs(path.stem))
        xr.testing.assert_identical(collect([path], path.stem, plan).drop_attrs(), published.drop_attrs())


@pytest.mark.workflow
def test_a_second_run_does_nothing(smoke: WorkflowCopy):
    run = smoke.snakemake("--config", "study=smoke", "--cores", "2")
    assert run.returncode == 0
    assert "Nothing to be done" in run.stdout


@pytest.mark.workflow
@pytest.mark.parametrize("name", ["coordinate_check", "lr_transfer_sgd", "verdicts"])
def test_touching_a_notebook_reruns_it_alone(smoke: WorkflowCopy, name: str):
    with smoke.touch(f"notebooks/{name}.ipynb"):
        run = smoke.snakemake("-n", "--printshellcmds", "--config", "study=smoke")
    assert set(re.findall(r"run_notebook\.py notebooks/(\w+)\.ipynb", run.stdout)) == {name}
    assert sum(job_counts(run.stdout).values()) == 2  # the notebook, and the report that shows its product


@pytest.mark.workflow
def test_a_changed_key_reruns_only_what_depends_on_it(smoke: WorkflowCopy):
    path = smoke.folder / "config/studies/smoke.yaml"
    before = path.read_text()
    study = yaml.safe_load(before)
    plan = load_study(path)
    sgd = [job for job in plan.jobs("lr_sweep") if job.optimizer == "sgd"]
    (sweep,) = (sweep for sweep in study["sweeps"] if sweep["optimizer"] == "sgd")
    sweep["learning_rates"]["log2_last"] += 1
    try:
        path.write_text(yaml.safe_dump(study))
        planned = smoke.planned("--config", "study=smoke")
    finally:
        path.write_text(before)
    assert planned["lr_sweep"] == len(sgd)
    assert planned["corpus"] == planned["coordinate_check"] == planned["figure_coordinate_check"] == 0
    assert smoke.planned("--config", "study=smoke").total() == 0


@pytest.mark.workflow
def test_one_figure_is_redrawn_by_its_name(smoke: WorkflowCopy):
    target = "results/smoke/figures/lr_transfer_adamw.svg"
    before = (smoke.folder / target).read_bytes()
    (smoke.folder / target).unlink()
    run = smoke.snakemake("--cores", "1", target)
    assert job_counts(run.stdout) == {"figure_lr_transfer": 1}, run.stdout
    assert (smoke.folder / target).read_bytes() == before
