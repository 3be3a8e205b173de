# From text to report: `snakemake --cores all` makes everything that the study in config/config.yaml asks for.
# One product by its name: `snakemake --cores 1 results/laptop/figures/lr_transfer_adamw.svg`.
from snakemake.utils import min_version

min_version("9.10")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/corpus.smk"
include: "workflow/rules/coordinate_check.smk"
include: "workflow/rules/multiplier.smk"
include: "workflow/rules/clipping.smk"
include: "workflow/rules/lr_sweep.smk"
include: "workflow/rules/tuning.smk"
include: "workflow/rules/published.smk" if PUBLISHED else "workflow/rules/datasets.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/safety.smk"
include: "workflow/rules/comparisons.smk"


rule all:
    default_target: True
    input:
        get_products(STUDY),
        f"results/{STUDY}/report.html",


rule compare:
    input:
        expand(
            "results/comparisons/{comparison}.{suffix}",
            comparison=sorted(
                os.path.splitext(os.path.basename(path))[0] for path in glob.glob("config/comparisons/*.yaml")
            ),
            suffix=("svg", "png", "csv"),
        ),
