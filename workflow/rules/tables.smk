# A table is a notebook too, with a csv for programs, Markdown for people, TeX for papers and a page for the report.
rule table_scaling_rules:
    input:
        notebook="notebooks/scaling_rules.ipynb",
        code=["src/gdn_mup/scaling/rules.py", "src/gdn_mup/study/tables.py"],
    output:
        csv="results/{study}/tables/scaling_rules.csv",
        page=report(
            "results/{study}/tables/scaling_rules.html",
            caption="../report/scaling_rules.rst",
            category="Tables",
            labels={"table": "Scaling rules"},
        ),
        md="results/{study}/tables/scaling_rules.md",
        tex="results/{study}/tables/scaling_rules.tex",
        notebook="results/{study}/notebooks/scaling_rules.ipynb",
    log:
        "results/{study}/logs/tables/scaling_rules.log",
    benchmark:
        "results/{study}/benchmarks/tables/scaling_rules.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=30,
    params:
        parameters=get_parameters,
        regime=get_regime,
    message:
        "Table of study {wildcards.study}: scaling rules"
    shell:
        "python workflow/scripts/run_notebook.py {input.notebook} {output.notebook} {params.parameters} > {log} 2>&1"
        " && python workflow/scripts/table_page.py {output.md} {output.page} >> {log} 2>&1"


use rule table_scaling_rules as table_optima with:
    input:
        notebook="notebooks/optima.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=multiext("src/gdn_mup/study/", "loss_curve.py", "optimum.py", "tables.py"),
    output:
        csv="results/{study}/tables/optima.csv",
        page=report(
            "results/{study}/tables/optima.html",
            caption="../report/optima.rst",
            category="Tables",
            labels={"table": "Optima"},
        ),
        md="results/{study}/tables/optima.md",
        tex="results/{study}/tables/optima.tex",
        notebook="results/{study}/notebooks/optima.ipynb",
    log:
        "results/{study}/logs/tables/optima.log",
    benchmark:
        "results/{study}/benchmarks/tables/optima.tsv"
    message:
        "Table of study {wildcards.study}: optima and transfer regret"


use rule table_scaling_rules as table_transfer_metrics with:
    input:
        notebook="notebooks/transfer_metrics.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=multiext("src/gdn_mup/study/", "loss_curve.py", "optimum.py", "width_fit.py", "tables.py"),
    output:
        csv="results/{study}/tables/transfer_metrics.csv",
        page=report(
            "results/{study}/tables/transfer_metrics.html",
            caption="../report/transfer_metrics.rst",
            category="Tables",
            labels={"table": "Metrics of transfer"},
        ),
        md="results/{study}/tables/transfer_metrics.md",
        tex="results/{study}/tables/transfer_metrics.tex",
        notebook="results/{study}/notebooks/transfer_metrics.ipynb",
    log:
        "results/{study}/logs/tables/transfer_metrics.log",
    benchmark:
        "results/{study}/benchmarks/tables/transfer_metrics.tsv"
    message:
        "Table of study {wildcards.study}: metrics of transfer"


use rule table_scaling_rules as table_verdicts with:
    input:
        unpack(get_datasets(EVIDENCE)),
        notebook="notebooks/verdicts.ipynb",
        code=multiext(
            "src/gdn_mup/study/",
            *(
                "claims.py",
                "clipping.py",
                "cost.py",
                "equivalence.py",
                "estimates.py",
                "exponents.py",
                "loss_curve.py",
            ),
            *("multiplier.py", "optimum.py", "tables.py", "tuning.py"),
        ),
    output:
        csv="results/{study}/tables/verdicts.csv",
        page=report(
            "results/{study}/tables/verdicts.html",
            caption="../report/verdicts.rst",
            category="Tables",
            labels={"table": "Verdicts"},
        ),
        md="results/{study}/tables/verdicts.md",
        tex="results/{study}/tables/verdicts.tex",
        notebook="results/{study}/notebooks/verdicts.ipynb",
    log:
        "results/{study}/logs/tables/verdicts.log",
    benchmark:
        "results/{study}/benchmarks/tables/verdicts.tsv"
    params:
        parameters=get_parameters_of(EVIDENCE),
        regime=get_regime,
    message:
        "Table of study {wildcards.study}: verdicts on the claims"


use rule table_scaling_rules as table_cost with:
    input:
        unpack(get_datasets(KINDS)),
        notebook="notebooks/cost.ipynb",
        code=[*multiext("src/gdn_mup/study/", "cost.py", "tables.py"), "src/gdn_mup/model/flops.py"],
    output:
        csv="results/{study}/tables/cost.csv",
        page=report(
            "results/{study}/tables/cost.html",
            caption="../report/cost.rst",
            category="Tables",
            labels={"table": "Cost"},
        ),
        md="results/{study}/tables/cost.md",
        tex="results/{study}/tables/cost.tex",
        notebook="results/{study}/notebooks/cost.ipynb",
    log:
        "results/{study}/logs/tables/cost.log",
    benchmark:
        "results/{study}/benchmarks/tables/cost.tsv"
    params:
        parameters=get_parameters_of(KINDS),
        regime=get_regime,
    message:
        "Table of study {wildcards.study}: what it cost"
