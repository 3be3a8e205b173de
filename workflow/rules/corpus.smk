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
    threads: 2
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=get_corpus_settings,
        study="config/studies/{study}.yaml",
        directory=subpath(output.tokenizer, parent=True),
    message:
        "Corpus and tokenizer of study {wildcards.study}"
    shell:
        "gdn-mup corpus --study {params.study} --output {params.directory} > {log} 2>&1"
