rule coordinate_check:
    input:
        tokens="results/{study}/corpus/train.tokens",
        validation_tokens="results/{study}/corpus/validation.tokens",
    output:
        "results/{study}/jobs/coordinates/{growth}_{optimizer}_width{width}_seed{seed}.nc",
    log:
        "results/{study}/logs/coordinates/{growth}_{optimizer}_width{width}_seed{seed}.log",
    benchmark:
        "results/{study}/benchmarks/coordinates/{growth}_{optimizer}_width{width}_seed{seed}.tsv"
    conda:
        "../../environment.yml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=get_training_memory,
        runtime=120,
        gpu=lambda wildcards: min(1, get_gpus(wildcards)),  # one process, also where several train together
        device=config["device"],  # not a parameter: on another device a finished job need not run again
    params:
        settings=get_job_settings("coordinates"),
        study="config/studies/{study}.yaml",
        corpus=subpath(input.tokens, parent=True),
    message:
        "Coordinate check of study {wildcards.study}: growth by {wildcards.growth}, {wildcards.optimizer}, "
        "width {wildcards.width}, seed {wildcards.seed}"
    shell:
        "gdn-mup coordinates --study {params.study} --corpus {params.corpus}"
        " --growth {wildcards.growth} --optimizer {wildcards.optimizer}"
        " --width {wildcards.width} --seed {wildcards.seed} --device {resources.device} --output {output} > {log} 2>&1"
