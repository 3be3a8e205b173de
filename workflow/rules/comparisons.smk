# A study of studies: a figure that speaks of several, named in config/comparisons/. With `runs: reference` it is drawn from
# the published datasets; with `runs: own` every study in it is trained first.
rule comparison:
    input:
        unpack(get_compared_datasets),
        notebook="notebooks/{comparison}.ipynb",
        code=[
            "src/gdn_mup/study/figures/training_length.py",
            *multiext(
                "src/gdn_mup/study/",
                *("equivalence.py", "loss_curve.py", "optimum.py", "regime.py", "training_length.py"),
            ),
        ],
    output:
        svg="results/comparisons/{comparison}.svg",
        png="results/comparisons/{comparison}.png",
        csv="results/comparisons/{comparison}.csv",
        notebook="results/comparisons/{comparison}.ipynb",
    log:
        "results/comparisons/logs/{comparison}.log",
    benchmark:
        "results/comparisons/benchmarks/{comparison}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        studies=lambda wildcards, input: " ".join(
            f"{name}={input[name]}" for name in get_comparison(wildcards.comparison).studies
        ),
        output=lambda wildcards, output: os.path.splitext(output.csv)[0],
    message:
        "Comparison of studies: {wildcards.comparison}"
    shell:
        "python workflow/scripts/run_notebook.py {input.notebook} {output.notebook}"
        ' "studies={params.studies}" output={params.output} > {log} 2>&1'
