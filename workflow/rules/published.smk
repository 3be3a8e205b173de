# With `runs: reference` a study's datasets are the published ones. No job runs.
rule published_dataset:
    input:
        "results/reference/{study}/{kind}.nc",
    output:
        "results/{study}/datasets/{kind}.nc",
    log:
        "results/{study}/logs/datasets/{kind}.log",
    benchmark:
        "results/{study}/benchmarks/datasets/{kind}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=10,
    message:
        "Published dataset of study {wildcards.study}: {wildcards.kind}"
    shell:
        "cp {input} {output} 2>&1 | tee {log} >&2"
