rule collect_lr_sweep:
    input:
        jobs=get_job_files("lr_sweep"),
        code="src/gdn_mup/study/datasets.py",
    output:
        "results/{study}/datasets/lr_sweep.nc",
    log:
        "results/{study}/logs/datasets/lr_sweep.log",
    benchmark:
        "results/{study}/benchmarks/datasets/lr_sweep.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=30,
    params:
        study="config/studies/{study}.yaml",
        kind="lr_sweep",
    message:
        "Dataset of every learning-rate sweep of study {wildcards.study}"
    shell:
        "gdn-mup collect --study {params.study} --kind {params.kind} --output {output} {input.jobs} > {log} 2>&1"


use rule collect_lr_sweep as collect_multiplier with:
    input:
        jobs=get_job_files("multiplier"),
        code="src/gdn_mup/study/datasets.py",
    output:
        "results/{study}/datasets/multiplier.nc",
    log:
        "results/{study}/logs/datasets/multiplier.log",
    benchmark:
        "results/{study}/benchmarks/datasets/multiplier.tsv"
    params:
        study="config/studies/{study}.yaml",
        kind="multiplier",
    message:
        "Dataset of every multiplier check of study {wildcards.study}"


use rule collect_lr_sweep as collect_clipping with:
    input:
        jobs=get_job_files("clipping"),
        code="src/gdn_mup/study/datasets.py",
    output:
        "results/{study}/datasets/clipping.nc",
    log:
        "results/{study}/logs/datasets/clipping.log",
    benchmark:
        "results/{study}/benchmarks/datasets/clipping.tsv"
    params:
        study="config/studies/{study}.yaml",
        kind="clipping",
    message:
        "Dataset of every clipping check of study {wildcards.study}"


use rule collect_lr_sweep as collect_tuning with:
    input:
        jobs=get_job_files("tuning"),
        code="src/gdn_mup/study/datasets.py",
    output:
        "results/{study}/datasets/tuning.nc",
    log:
        "results/{study}/logs/datasets/tuning.log",
    benchmark:
        "results/{study}/benchmarks/datasets/tuning.tsv"
    params:
        study="config/studies/{study}.yaml",
        kind="tuning",
    message:
        "Dataset of every search over multipliers of study {wildcards.study}"


use rule collect_lr_sweep as collect_coordinates with:
    input:
        jobs=get_job_files("coordinates"),
        code="src/gdn_mup/study/datasets.py",
    output:
        "results/{study}/datasets/coordinates.nc",
    log:
        "results/{study}/logs/datasets/coordinates.log",
    benchmark:
        "results/{study}/benchmarks/datasets/coordinates.tsv"
    params:
        study="config/studies/{study}.yaml",
        kind="coordinates",
    message:
        "Dataset of every coordinate check of study {wildcards.study}"
