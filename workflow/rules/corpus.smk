# Wheels that are whole stay in the folder, whatever becomes of the others: what broke off is fetched again, no more.
rule fetch_packages:
    input:
        lambda wildcards: get_study(wildcards.study).corpus.requirements,
    output:
        "results/{study}/corpus/downloads/packages.json",
    log:
        "results/{study}/logs/fetch_packages.log",
    benchmark:
        "results/{study}/benchmarks/fetch_packages.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=60,
    params:
        study="config/studies/{study}.yaml",
        directory=subpath(output[0], parent=True),
    message:
        "Packages whose text study {wildcards.study} trains on"
    shell:
        "gdn-mup fetch --study {params.study} --output {params.directory} > {log} 2>&1"


# A dataset that is streamed leaves its state beside the outputs, and a job that is killed goes on from there.
rule corpus:
    input:
        get_corpus_files,
    output:
        tokenizer="results/{study}/corpus/tokenizer.json",
        tokens="results/{study}/corpus/train.tokens",
        sidecar="results/{study}/corpus/train.json",
        validation_tokens="results/{study}/corpus/validation.tokens",
        validation_sidecar="results/{study}/corpus/validation.json",
    log:
        "results/{study}/logs/corpus.log",
    benchmark:
        "results/{study}/benchmarks/corpus.tsv"
    conda:
        "../../environment.yml"
    threads: get_corpus_threads
    resources:
        mem_mb=4000,  # a gigabyte of text takes 2.7 GB
        runtime=get_corpus_runtime,
    params:
        settings=get_corpus_settings,
        study="config/studies/{study}.yaml",
        directory=subpath(output.tokenizer, parent=True),
    message:
        "Corpus and tokenizer of study {wildcards.study}"
    shell:
        "gdn-mup corpus --study {params.study} --output {params.directory} > {log} 2>&1"
