# Snakemake's own report of the products that exist by then. The inner Snakemake only reads: it takes no lock.
rule report_html:
    input:
        products=lambda wildcards: get_products(wildcards.study),
        captions=sorted(glob.glob("workflow/report/*.rst")),
    output:
        "results/{study}/report.html",
    log:
        "results/{study}/logs/report.log",
    benchmark:
        "results/{study}/benchmarks/report.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        runs=config["runs"],
    message:
        "Report of study {wildcards.study}"
    shell:
        "snakemake --config study={wildcards.study} runs={params.runs} --report {output} -- {input.products} 2>&1"
        " | tee {log} > /dev/null"
