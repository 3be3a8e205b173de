# A figure is a notebook that is given datasets. Edit notebooks/<figure>.ipynb, or the code that it draws with, and
# Snakemake draws it again.
rule figure_coordinate_check:
    input:
        notebook="notebooks/coordinate_check.ipynb",
        coordinates="results/{study}/datasets/coordinates.nc",
        code=["src/gdn_mup/study/figures/style.py", "src/gdn_mup/study/figures/coordinates.py"],
    output:
        svg=report(
            "results/{study}/figures/coordinate_check.svg",
            caption="../report/coordinate_check.rst",
            category="Figures",
            labels={"figure": "Coordinate check"},
        ),
        png="results/{study}/figures/coordinate_check.png",
        csv="results/{study}/figures/coordinate_check.csv",
        notebook="results/{study}/notebooks/coordinate_check.ipynb",
    log:
        "results/{study}/logs/figures/coordinate_check.log",
    benchmark:
        "results/{study}/benchmarks/figures/coordinate_check.tsv"
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
        "Figure of study {wildcards.study}: coordinate check"
    shell:
        "python workflow/scripts/run_notebook.py {input.notebook} {output.notebook} {params.parameters} > {log} 2>&1"


use rule figure_coordinate_check as figure_norm_epsilon with:
    input:
        notebook="notebooks/norm_epsilon.ipynb",
        multiplier="results/{study}/datasets/multiplier.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/multiplier.py",
            "src/gdn_mup/study/multiplier.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/norm_epsilon.svg",
            caption="../report/norm_epsilon.rst",
            category="Figures",
            labels={"figure": "Multiplier before the norm"},
        ),
        png="results/{study}/figures/norm_epsilon.png",
        csv="results/{study}/figures/norm_epsilon.csv",
        notebook="results/{study}/notebooks/norm_epsilon.ipynb",
    log:
        "results/{study}/logs/figures/norm_epsilon.log",
    benchmark:
        "results/{study}/benchmarks/figures/norm_epsilon.tsv"
    message:
        "Figure of study {wildcards.study}: multiplier before the norm, and the norm's epsilon"


use rule figure_coordinate_check as figure_clipping with:
    input:
        notebook="notebooks/clipping.ipynb",
        clipping="results/{study}/datasets/clipping.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/clipping.py",
            "src/gdn_mup/study/clipping.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/clipping.svg",
            caption="../report/clipping.rst",
            category="Figures",
            labels={"figure": "Gradient clipping"},
        ),
        png="results/{study}/figures/clipping.png",
        csv="results/{study}/figures/clipping.csv",
        notebook="results/{study}/notebooks/clipping.ipynb",
    log:
        "results/{study}/logs/figures/clipping.log",
    benchmark:
        "results/{study}/benchmarks/figures/clipping.tsv"
    message:
        "Figure of study {wildcards.study}: gradient clipping against width"


use rule figure_coordinate_check as figure_base_width_tuning with:
    input:
        notebook="notebooks/base_width_tuning.ipynb",
        tuning="results/{study}/datasets/tuning.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/tuning.py",
            "src/gdn_mup/study/tuning.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/base_width_tuning.svg",
            caption="../report/base_width_tuning.rst",
            category="Figures",
            labels={"figure": "Tuning at the base width"},
        ),
        png="results/{study}/figures/base_width_tuning.png",
        csv="results/{study}/figures/base_width_tuning.csv",
        notebook="results/{study}/notebooks/base_width_tuning.ipynb",
    log:
        "results/{study}/logs/figures/base_width_tuning.log",
    benchmark:
        "results/{study}/benchmarks/figures/base_width_tuning.tsv"
    message:
        "Figure of study {wildcards.study}: tuning at the base width"


use rule figure_coordinate_check as figure_lr_transfer with:
    input:
        notebook="notebooks/lr_transfer_{optimizer}.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/transfer.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/lr_transfer_{optimizer}.svg",
            caption="../report/lr_transfer.rst",
            category="Figures",
            labels=get_transfer_labels,
        ),
        png="results/{study}/figures/lr_transfer_{optimizer}.png",
        csv="results/{study}/figures/lr_transfer_{optimizer}.csv",
        notebook="results/{study}/notebooks/lr_transfer_{optimizer}.ipynb",
    log:
        "results/{study}/logs/figures/lr_transfer_{optimizer}.log",
    benchmark:
        "results/{study}/benchmarks/figures/lr_transfer_{optimizer}.tsv"
    message:
        "Figure of study {wildcards.study}: learning-rate transfer under {wildcards.optimizer}"


use rule figure_coordinate_check as figure_optimum_vs_width with:
    input:
        notebook="notebooks/optimum_vs_width.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/transfer.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/optimum_vs_width.svg",
            caption="../report/optimum_vs_width.rst",
            category="Figures",
            labels={"figure": "Optimum against width"},
        ),
        png="results/{study}/figures/optimum_vs_width.png",
        csv="results/{study}/figures/optimum_vs_width.csv",
        notebook="results/{study}/notebooks/optimum_vs_width.ipynb",
    log:
        "results/{study}/logs/figures/optimum_vs_width.log",
    benchmark:
        "results/{study}/benchmarks/figures/optimum_vs_width.tsv"
    message:
        "Figure of study {wildcards.study}: optimum against width"


use rule figure_coordinate_check as figure_loss_vs_width with:
    input:
        notebook="notebooks/loss_vs_width.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/losses.py",
            "src/gdn_mup/study/figures/transfer.py",
            "src/gdn_mup/study/losses.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/loss_vs_width.svg",
            caption="../report/loss_vs_width.rst",
            category="Figures",
            labels={"figure": "Loss against width"},
        ),
        png="results/{study}/figures/loss_vs_width.png",
        csv="results/{study}/figures/loss_vs_width.csv",
        notebook="results/{study}/notebooks/loss_vs_width.ipynb",
    log:
        "results/{study}/logs/figures/loss_vs_width.log",
    benchmark:
        "results/{study}/benchmarks/figures/loss_vs_width.tsv"
    message:
        "Figure of study {wildcards.study}: loss against width"


use rule figure_coordinate_check as figure_growth_modes with:
    input:
        notebook="notebooks/growth_modes.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/growth.py",
            "src/gdn_mup/study/figures/transfer.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/growth_modes.svg",
            caption="../report/growth_modes.rst",
            category="Figures",
            labels={"figure": "Growth by more and by larger heads"},
        ),
        png="results/{study}/figures/growth_modes.png",
        csv="results/{study}/figures/growth_modes.csv",
        notebook="results/{study}/notebooks/growth_modes.ipynb",
    log:
        "results/{study}/logs/figures/growth_modes.log",
    benchmark:
        "results/{study}/benchmarks/figures/growth_modes.tsv"
    message:
        "Figure of study {wildcards.study}: growth by more heads and by larger ones"


use rule figure_coordinate_check as figure_published_losses with:
    input:
        notebook="notebooks/published_losses.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/published.py",
            "src/gdn_mup/study/published.py",
            "src/gdn_mup/study/losses.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/published_losses.svg",
            caption="../report/published_losses.rst",
            category="Figures",
            labels={"figure": "The paper's losses"},
        ),
        png="results/{study}/figures/published_losses.png",
        csv="results/{study}/figures/published_losses.csv",
        notebook="results/{study}/notebooks/published_losses.ipynb",
    log:
        "results/{study}/logs/figures/published_losses.log",
    benchmark:
        "results/{study}/benchmarks/figures/published_losses.tsv"
    message:
        "Figure of study {wildcards.study}: the paper's losses beside ours"


use rule figure_coordinate_check as figure_training_curves with:
    input:
        notebook="notebooks/training_curves.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/training.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/training_curves.svg",
            caption="../report/training_curves.rst",
            category="Figures",
            labels={"figure": "Training curves"},
        ),
        png="results/{study}/figures/training_curves.png",
        csv="results/{study}/figures/training_curves.csv",
        notebook="results/{study}/notebooks/training_curves.ipynb",
    log:
        "results/{study}/logs/figures/training_curves.log",
    benchmark:
        "results/{study}/benchmarks/figures/training_curves.tsv"
    message:
        "Figure of study {wildcards.study}: training curves"


use rule figure_coordinate_check as figure_transfer_over_training with:
    input:
        notebook="notebooks/transfer_over_training.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/over_training.py",
            "src/gdn_mup/study/figures/growth.py",
            "src/gdn_mup/study/figures/transfer.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/transfer_over_training.svg",
            caption="../report/transfer_over_training.rst",
            category="Figures",
            labels={"figure": "Transfer over training"},
        ),
        png="results/{study}/figures/transfer_over_training.png",
        csv="results/{study}/figures/transfer_over_training.csv",
        notebook="results/{study}/notebooks/transfer_over_training.ipynb",
    log:
        "results/{study}/logs/figures/transfer_over_training.log",
    benchmark:
        "results/{study}/benchmarks/figures/transfer_over_training.tsv"
    message:
        "Figure of study {wildcards.study}: transfer of the learning rate over training"


use rule figure_coordinate_check as figure_clipped_updates with:
    input:
        notebook="notebooks/clipped_updates.ipynb",
        lr_sweep="results/{study}/datasets/lr_sweep.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/clipped_updates.py",
            "src/gdn_mup/study/clipping.py",
            "src/gdn_mup/study/loss_curve.py",
            "src/gdn_mup/study/optimum.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/clipped_updates.svg",
            caption="../report/clipped_updates.rst",
            category="Figures",
            labels={"figure": "Updates clipped"},
        ),
        png="results/{study}/figures/clipped_updates.png",
        csv="results/{study}/figures/clipped_updates.csv",
        notebook="results/{study}/notebooks/clipped_updates.ipynb",
    log:
        "results/{study}/logs/figures/clipped_updates.log",
    benchmark:
        "results/{study}/benchmarks/figures/clipped_updates.tsv"
    message:
        "Figure of study {wildcards.study}: share of updates clipped against width"


use rule figure_coordinate_check as figure_predicted_exponents with:
    input:
        notebook="notebooks/predicted_exponents.ipynb",
        coordinates="results/{study}/datasets/coordinates.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/exponents.py",
            "src/gdn_mup/study/exponents.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/predicted_exponents.svg",
            caption="../report/predicted_exponents.rst",
            category="Figures",
            labels={"figure": "Predicted and measured exponents"},
        ),
        png="results/{study}/figures/predicted_exponents.png",
        csv="results/{study}/figures/predicted_exponents.csv",
        notebook="results/{study}/notebooks/predicted_exponents.ipynb",
    log:
        "results/{study}/logs/figures/predicted_exponents.log",
    benchmark:
        "results/{study}/benchmarks/figures/predicted_exponents.tsv"
    message:
        "Figure of study {wildcards.study}: predicted and measured exponents"


use rule figure_coordinate_check as figure_gate_gradients with:
    input:
        notebook="notebooks/gate_gradients.ipynb",
        coordinates="results/{study}/datasets/coordinates.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/exponents.py",
            "src/gdn_mup/study/exponents.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/gate_gradients.svg",
            caption="../report/gate_gradients.rst",
            category="Figures",
            labels={"figure": "Gate gradients over training"},
        ),
        png="results/{study}/figures/gate_gradients.png",
        csv="results/{study}/figures/gate_gradients.csv",
        notebook="results/{study}/notebooks/gate_gradients.ipynb",
    log:
        "results/{study}/logs/figures/gate_gradients.log",
    benchmark:
        "results/{study}/benchmarks/figures/gate_gradients.tsv"
    message:
        "Figure of study {wildcards.study}: gate gradients over training"


use rule figure_coordinate_check as figure_gate_dynamics with:
    input:
        notebook="notebooks/gate_dynamics.ipynb",
        coordinates="results/{study}/datasets/coordinates.nc",
        code=[
            "src/gdn_mup/study/figures/style.py",
            "src/gdn_mup/study/figures/dynamics.py",
            "src/gdn_mup/study/dynamics.py",
        ],
    output:
        svg=report(
            "results/{study}/figures/gate_dynamics.svg",
            caption="../report/gate_dynamics.rst",
            category="Figures",
            labels={"figure": "Gates and state over training"},
        ),
        png="results/{study}/figures/gate_dynamics.png",
        csv="results/{study}/figures/gate_dynamics.csv",
        notebook="results/{study}/notebooks/gate_dynamics.ipynb",
    log:
        "results/{study}/logs/figures/gate_dynamics.log",
    benchmark:
        "results/{study}/benchmarks/figures/gate_dynamics.tsv"
    message:
        "Figure of study {wildcards.study}: gates and state over training"
