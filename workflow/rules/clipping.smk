rule clipping:
    input:
        tokens="results/{study}/corpus/train.tokens",
        validation_tokens="results/{study}/corpus/validation.tokens",
    output:
        "results/{study}/jobs/clipping/{growth}_{optimizer}_width{width}_seed{seed}.nc",
    log:
        "results/{study}/logs/clipping/{growth}_{optimizer}_width{width}_seed{seed}.log",
    benchmark:
        "results/{study}/benchmarks/clipping/{growth}_{optimizer}_width{width}_seed{seed}.tsv"
    priority: LONG_JOB
    conda:
        "../../environment.yml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=get_training_memory,
        runtime=240,
        gpu=get_gpus,
        device=config["device"],  # not a parameter: on another device a finished job need not run again
    params:
        settings=get_job_settings("clipping"),
        study="config/studies/{study}.yaml",
        corpus=subpath(input.tokens, parent=True),
    message:
        "Clipping check of study {wildcards.study}: growth by {wildcards.growth}, {wildcards.optimizer}, "
        "width {wildcards.width}, seed {wildcards.seed}"
    shell:
        "gdn-mup clipping --study {params.study} --corpus {params.corpus}"
        " --growth {wildcards.growth} --optimizer {wildcards.optimizer}"
        " --width {wildcards.width} --seed {wildcards.seed} --device {resources.device} --output {output} > {log} 2>&1"
