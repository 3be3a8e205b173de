# In float64, which a GPU has no use for here: the models are small.
rule multiplier:
    input:
        tokens="results/{study}/corpus/train.tokens",
        validation_tokens="results/{study}/corpus/validation.tokens",
    output:
        "results/{study}/jobs/multiplier/{growth}_{optimizer}_width{width}_seed{seed}.nc",
    log:
        "results/{study}/logs/multiplier/{growth}_{optimizer}_width{width}_seed{seed}.log",
    benchmark:
        "results/{study}/benchmarks/multiplier/{growth}_{optimizer}_width{width}_seed{seed}.tsv"
    conda:
        "../../environment.yml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=1500,
        runtime=120,
    params:
        settings=get_job_settings("multiplier"),
        study="config/studies/{study}.yaml",
        corpus=subpath(input.tokens, parent=True),
    message:
        "Multiplier before the norm, study {wildcards.study}: growth by {wildcards.growth}, {wildcards.optimizer}, "
        "width {wildcards.width}, seed {wildcards.seed}"
    shell:
        "gdn-mup multiplier --study {params.study} --corpus {params.corpus}"
        " --growth {wildcards.growth} --optimizer {wildcards.optimizer}"
        " --width {wildcards.width} --seed {wildcards.seed} --output {output} > {log} 2>&1"
