#!/usr/bin/env bash
# The manifest: every row of the paper, and the exact command behind it.
#
#   ./run_all.sh list [PATTERN]       the rows:  id | clean/PGD-10/AA of the paper | command     (e.g. list 't2-*')
#   ./run_all.sh print ROW...         the commands that `run` executes, to be pasted into a shell
#   ./run_all.sh run ROW...           train and evaluate them, one after the other, in runs/ROW; again: goes on, or says it is done
#   ./run_all.sh run ROW --dry-run    print the setting that the row resolves to, and exit
#   ./run_all.sh run all              all of them, but for the quickstarts, x-tiny and the authors' released checkpoints
#                                     (a row that fails is named at the end; the others are run all the same)
#   ./run_all.sh cost ROW... [--precision bf16 --compile]   what they take on this machine, from a few steps of each
#   ./run_all.sh ids [PATTERN...]     the distinct runs that the rows need, one a line; without a pattern: those of `run all`
#   ./run_all.sh count                how many rows and distinct runs there are
#
# All distinct runs of Table 2, one a GPU of a machine with eight; with GNU parallel instead; on Slurm (sbatch --array=1-N):
#   ./run_all.sh ids 't2-*' | xargs -P 8 -n 1 --process-slot-var=CUDA_VISIBLE_DEVICES ./run_all.sh run
#   ./run_all.sh ids 't2-*' | parallel -j 8 CUDA_VISIBLE_DEVICES='$(({%} - 1))' ./run_all.sh run {}
#   SLURM_ARRAY_TASK_ID=7 ./run_all.sh run          the seventh distinct run
#
# ROW@S is the row with seed S, in a folder of its own; ROW may be a quoted pattern, 't2-*' or 't2-*@1': the distinct runs of
# the rows that match. A row `= other` is the same run as the other. A row is trained by its command and evaluated on all test
# images; what follows a `;` is how it is evaluated instead. PYTHON names what runs the scripts: an interpreter, or
# PYTHON="torchrun --nproc_per_node=8 --" for all of a machine's GPUs on one row. Under torchrun every batch, an epoch's last
# one too, has to split evenly, and rows with --early-stop-pgd take one process.

set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}

rows() {
    grep -v '^#' <<'ROWS'
# Not in the paper: they show that everything works, on the embedded data.
quickstart                          | -/-/-             | train_pgdat.py --model tiny --dataset data/cifar10_mini.npz --bn-mode eval --epochs 8 --batch-size 32 --lr 0.05 --lr-schedule onecycle ; eval_aa.py --n 100
quickstart-trades                   | -/-/-             | train_trades.py --model tiny --dataset data/cifar10_mini.npz --epochs 8 --batch-size 32 --lr 0.05 --lr-schedule onecycle ; eval_aa.py --n 100
# Table 2: early-stopped attack, warm-up of the learning rate, warm-up of eps; ResNet-18.
t2-base                             | 82.52/53.58/48.51 | train_pgdat.py
t2-early-stop-40-70                 | 86.52/52.65/46.6  | train_pgdat.py --early-stop-pgd 40 70
t2-early-stop-40-100                | 86.56/53.22/46.04 | train_pgdat.py --early-stop-pgd 40 100
t2-early-stop-60-100                | 85.67/52.90/45.96 | train_pgdat.py --early-stop-pgd 60 100
t2-warmup-lr-10                     | 82.45/53.43/48.26 | train_pgdat.py --warmup-lr 10
t2-warmup-lr-15                     | 82.64/53.29/48.12 | train_pgdat.py --warmup-lr 15
t2-warmup-lr-20                     | 82.31/53.35/48.37 | train_pgdat.py --warmup-lr 20
t2-warmup-eps-10                    | 82.64/53.65/48.44 | train_pgdat.py --warmup-eps 10
t2-warmup-eps-15                    | 82.75/53.27/48.17 | train_pgdat.py --warmup-eps 15
t2-warmup-eps-20                    | 82.78/53.62/48.48 | train_pgdat.py --warmup-eps 20
# Table 3: batch size, with the basic and the linearly scaled learning rate.
t3-r18-b64                          | 80.08/51.31/-     | train_pgdat.py --batch-size 64
t3-r18-b64-scaled                   | 82.44/52.48/-     | train_pgdat.py --batch-size 64 --lr 0.05
t3-r18-b128                         | 82.52/53.58/-     | = t2-base
t3-r18-b256                         | 83.33/52.20/-     | train_pgdat.py --batch-size 256
t3-r18-b256-scaled                  | 82.24/52.52/-     | train_pgdat.py --batch-size 256 --lr 0.2
t3-r18-b512                         | 83.40/50.69/-     | train_pgdat.py --batch-size 512
t3-r18-b512-scaled                  | 82.16/53.36/-     | train_pgdat.py --batch-size 512 --lr 0.4
t3-wrn10-b64                        | 84.20/54.69/-     | train_pgdat.py --model wrn-34-10 --batch-size 64
t3-wrn10-b64-scaled                 | 85.40/54.86/-     | train_pgdat.py --model wrn-34-10 --batch-size 64 --lr 0.05
t3-wrn10-b128                       | 86.07/56.60/-     | = t8-wrn10-wd5e-4-relu-bntrain
t3-wrn10-b256                       | 86.21/52.90/-     | train_pgdat.py --model wrn-34-10 --batch-size 256
t3-wrn10-b256-scaled                | 85.89/56.09/-     | train_pgdat.py --model wrn-34-10 --batch-size 256 --lr 0.2
t3-wrn10-b512                       | 86.29/50.17/-     | train_pgdat.py --model wrn-34-10 --batch-size 512
t3-wrn10-b512-scaled                | 86.47/55.49/-     | train_pgdat.py --model wrn-34-10 --batch-size 512 --lr 0.4
# Table 4: label smoothing.
t4-r18-ls0                          | 82.52/53.58/48.51 | = t2-base
t4-r18-ls0.1                        | 82.69/54.04/48.76 | train_pgdat.py --ls 0.1
t4-r18-ls0.2                        | 82.73/54.22/49.20 | train_pgdat.py --ls 0.2
t4-r18-ls0.3                        | 82.51/54.34/49.24 | train_pgdat.py --ls 0.3
t4-r18-ls0.4                        | 82.39/54.13/48.83 | train_pgdat.py --ls 0.4
t4-wrn10-ls0                        | 86.07/56.60/52.19 | = t8-wrn10-wd5e-4-relu-bntrain
t4-wrn10-ls0.1                      | 85.96/56.88/52.74 | train_pgdat.py --model wrn-34-10 --ls 0.1
t4-wrn10-ls0.2                      | 86.09/57.31/53.00 | train_pgdat.py --model wrn-34-10 --ls 0.2
t4-wrn10-ls0.3                      | 85.99/57.55/52.70 | train_pgdat.py --model wrn-34-10 --ls 0.3
t4-wrn10-ls0.4                      | 86.19/57.63/52.71 | train_pgdat.py --model wrn-34-10 --ls 0.4
# Table 5: optimisers; ResNet-18.
t5-mom                              | 82.52/53.58/48.51 | = t2-base
t5-nesterov                         | 82.83/53.78/48.22 | train_pgdat.py --optimizer nesterov
t5-adam                             | 83.20/48.87/44.04 | train_pgdat.py --optimizer adam
t5-adamw                            | 81.68/46.58/42.39 | train_pgdat.py --optimizer adamw
t5-sgd-gc                           | 82.77/53.62/48.33 | train_pgdat.py --optimizer sgd-gc
t5-sgd-gcc                          | 82.93/53.40/48.51 | train_pgdat.py --optimizer sgd-gcc
# Table 6: activations; ResNet-18. Those with a double dagger in the paper use weight decay 5e-5.
t6-relu                             | 82.52/53.58/-     | = t2-base
t6-leakyrelu                        | 82.11/53.25/-     | train_pgdat.py --activation leakyrelu
t6-elu                              | 82.17/52.08/-     | train_pgdat.py --activation elu --wd 5e-5
t6-celu                             | 81.37/51.37/-     | train_pgdat.py --activation celu --wd 5e-5
t6-selu                             | 78.88/49.53/-     | train_pgdat.py --activation selu --wd 5e-5
t6-gelu                             | 80.42/52.21/-     | train_pgdat.py --activation gelu
t6-softplus                         | 82.80/54.30/-     | train_pgdat.py --activation softplus
t6-tanh                             | 80.13/49.12/-     | train_pgdat.py --activation tanh --wd 5e-5
# Table 7: BN mode.
t7-r18-bntrain                      | 82.52/53.58/48.51 | = t2-base
t7-r18-bneval                       | 83.48/53.64/48.75 | train_pgdat.py --bn-mode eval
t7-senet18-bntrain                  | 82.20/54.01/48.72 | train_pgdat.py --model senet-18
t7-senet18-bneval                   | 84.11/53.90/48.95 | train_pgdat.py --model senet-18 --bn-mode eval
t7-densenet121-bntrain              | 85.38/56.22/51.58 | train_pgdat.py --model densenet-121
t7-densenet121-bneval               | 86.33/56.11/51.24 | train_pgdat.py --model densenet-121 --bn-mode eval
t7-googlenet-bntrain                | 83.97/53.76/48.73 | train_pgdat.py --model googlenet
t7-googlenet-bneval                 | 85.26/53.77/48.83 | train_pgdat.py --model googlenet --bn-mode eval
t7-dpn26-bntrain                    | 83.67/53.88/48.50 | train_pgdat.py --model dpn-26
t7-dpn26-bneval                     | 84.56/53.41/48.30 | train_pgdat.py --model dpn-26 --bn-mode eval
t7-wrn10-bntrain                    | 86.07/56.60/52.19 | = t8-wrn10-wd5e-4-relu-bntrain
t7-wrn10-bneval                     | 87.38/56.04/51.93 | = t8-wrn10-wd5e-4-relu-bneval
# Table 8: combinations of tricks, PGD-AT.
t8-wrn10-wd1e-4-relu-bntrain        | 85.87/49.45/46.43 | train_pgdat.py --model wrn-34-10 --wd 1e-4 --bn-mode train
t8-wrn10-wd2e-4-relu-bntrain        | 86.14/52.08/48.72 | train_pgdat.py --model wrn-34-10 --wd 2e-4 --bn-mode train
t8-wrn10-wd5e-4-relu-bntrain        | 86.07/56.60/52.19 | train_pgdat.py --model wrn-34-10 --wd 5e-4 --bn-mode train
t8-wrn10-wd5e-4-relu-bneval         | 87.38/56.04/51.93 | train_pgdat.py --model wrn-34-10 --wd 5e-4 --bn-mode eval
t8-wrn10-wd5e-4-softplus-bntrain    | 86.60/56.44/52.70 | train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode train
t8-wrn10-wd5e-4-softplus-bntrain-ls0.1 | 86.42/57.22/53.01 | train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode train --ls 0.1
t8-wrn10-wd5e-4-softplus-bneval-ls0.1 | 86.34/56.38/52.21 | train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.1
t8-wrn10-wd5e-4-softplus-bntrain-ls0.2 | 86.10/56.55/52.91 | train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode train --ls 0.2
t8-wrn10-wd5e-4-softplus-bneval-ls0.2 | 86.98/56.21/52.10 | train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.2
t8-wrn20-wd1e-4-relu-bntrain        | 86.21/49.74/47.58 | train_pgdat.py --model wrn-34-20 --wd 1e-4 --bn-mode train
t8-wrn20-wd2e-4-relu-bntrain        | 86.73/51.39/49.03 | train_pgdat.py --model wrn-34-20 --wd 2e-4 --bn-mode train
t8-wrn20-wd5e-4-relu-bntrain        | 86.97/57.57/53.26 | train_pgdat.py --model wrn-34-20 --wd 5e-4 --bn-mode train
t8-wrn20-wd5e-4-relu-bneval         | 87.62/57.04/53.14 | train_pgdat.py --model wrn-34-20 --wd 5e-4 --bn-mode eval
t8-wrn20-wd5e-4-softplus-bntrain    | 85.80/57.84/53.64 | train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode train
t8-wrn20-wd5e-4-softplus-bntrain-ls0.1 | 85.69/57.86/53.66 | train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode train --ls 0.1
t8-wrn20-wd5e-4-softplus-bneval-ls0.1 | 87.86/57.33/53.23 | train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.1
t8-wrn20-wd5e-4-softplus-bntrain-ls0.2 | 84.82/57.93/53.39 | train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode train --ls 0.2
t8-wrn20-wd5e-4-softplus-bneval-ls0.2 | 87.58/57.19/53.26 | train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.2
# Table 9: TRADES. Assumptions, at both eps: beta 6 and the attack's step (0.007 at 0.031, as in Zhang et al.'s code; 2/255 at 8/255).
# The released codes have eval mode only: train mode is a reconstruction. 110 epochs are from the authors' README (of TRADES).
t9-eps0.031-wrn10-wd2e-4-relu-bntrain | 83.86/54.96/51.52 | train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode train --eps 0.031 --alpha 0.007
t9-eps0.031-wrn10-wd2e-4-relu-bneval | 85.17/55.10/51.85 | train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode eval --eps 0.031 --alpha 0.007
t9-eps0.031-wrn10-wd5e-4-relu-bntrain | 84.17/57.34/53.51 | train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode train --eps 0.031 --alpha 0.007
t9-eps0.031-wrn10-wd5e-4-relu-bneval | 85.34/58.54/54.64 | train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode eval --eps 0.031 --alpha 0.007
t9-eps0.031-wrn10-wd5e-4-softplus-bneval | 84.66/58.05/54.20 | train_trades.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --eps 0.031 --alpha 0.007
t9-eps0.031-wrn20-wd5e-4-relu-bneval | 86.93/57.93/54.42 | train_trades.py --model wrn-34-20 --wd 5e-4 --bn-mode eval --eps 0.031 --alpha 0.007
t9-eps0.031-wrn20-wd5e-4-softplus-bneval | 85.43/57.94/54.32 | train_trades.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --eps 0.031 --alpha 0.007
t9-eps8-wrn10-wd2e-4-relu-bntrain   | 84.50/54.60/50.94 | train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode train --eps 8/255 --alpha 2/255
t9-eps8-wrn10-wd2e-4-relu-bneval    | 85.17/54.58/51.54 | train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode eval --eps 8/255 --alpha 2/255
t9-eps8-wrn10-wd5e-4-relu-bntrain   | 84.04/57.41/53.83 | train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode train --eps 8/255 --alpha 2/255
t9-eps8-wrn10-wd5e-4-relu-bneval    | 85.48/57.45/53.80 | train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode eval --eps 8/255 --alpha 2/255
t9-eps8-wrn10-wd5e-4-softplus-bneval | 84.24/57.59/53.88 | train_trades.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --eps 8/255 --alpha 2/255
t9-eps8-wrn20-wd2e-4-relu-bntrain   | 84.50/53.86/51.18 | train_trades.py --model wrn-34-20 --wd 2e-4 --bn-mode train --eps 8/255 --alpha 2/255
t9-eps8-wrn20-wd2e-4-relu-bneval    | 85.48/53.21/50.59 | train_trades.py --model wrn-34-20 --wd 2e-4 --bn-mode eval --eps 8/255 --alpha 2/255
t9-eps8-wrn20-wd5e-4-relu-bntrain   | 85.87/57.40/54.22 | train_trades.py --model wrn-34-20 --wd 5e-4 --bn-mode train --eps 8/255 --alpha 2/255
t9-eps8-wrn20-wd5e-4-relu-bneval    | 86.43/57.91/54.39 | train_trades.py --model wrn-34-20 --wd 5e-4 --bn-mode eval --eps 8/255 --alpha 2/255
t9-eps8-wrn20-wd5e-4-softplus-bneval | 85.51/57.50/54.21 | train_trades.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --eps 8/255 --alpha 2/255
# Table 12: TRADES, ResNet-18. Assumptions and reconstruction as in Table 9.
t12-r18-wd5e-4-relu-bntrain         | 80.23/53.60/48.96 | train_trades.py --wd 5e-4 --bn-mode train
t12-r18-wd5e-4-softplus-bntrain     | 81.26/54.58/50.35 | train_trades.py --wd 5e-4 --activation softplus --bn-mode train
t12-r18-wd5e-4-relu-bneval          | 81.45/53.51/49.06 | train_trades.py --wd 5e-4 --bn-mode eval
t12-r18-wd5e-4-softplus-bneval      | 82.37/54.37/50.51 | train_trades.py --wd 5e-4 --activation softplus --bn-mode eval
# Table 13: the models of Table 9 that the paper enters in AutoAttack's benchmark; the authors' released checkpoints of them (linked
# from the README of github.com/P2333/Bag-of-Tricks-for-AT); and those of the quoted methods whose weights are public in PyTorch and whose
# architecture is here. model_cifar_wrn.pt is linked from the README of github.com/yaodongyu/TRADES; the other three are named as
# RobustBench (github.com/RobustBench/robustbench) stores them in models/cifar10/Linf when it loads them by that name. All take plain
# images but Rice et al.'s, which normalises as PGD-AT does here. Not here: Pang et al. 2020c (85.14/-/53.74: a network of its own, with
# normalised features and weights) and Qin et al. 2019 (86.28/-/52.84: a WRN-40-8, not released in PyTorch).
t13-eps8-wrn20                      | 86.43/-/54.39     | = t9-eps8-wrn20-wd5e-4-relu-bneval
t13-eps8-wrn10                      | 85.48/-/53.80     | = t9-eps8-wrn10-wd5e-4-relu-bneval
t13-eps0.031-wrn10                  | 85.34/-/54.64     | = t9-eps0.031-wrn10-wd5e-4-relu-bneval
t13-eps8-wrn20-released             | 86.43/-/54.39     | eval_aa.py checkpoints/wide20_trades_eps8_tricks.pt --model wrn-34-20 --no-normalize --eps 8/255
t13-eps8-wrn10-released             | 85.48/-/53.80     | eval_aa.py checkpoints/wide10_trades_eps8_tricks.pt --model wrn-34-10 --no-normalize --eps 8/255
t13-eps0.031-wrn10-released         | 85.34/-/54.64     | eval_aa.py checkpoints/wide10_trades_tricks.pt --model wrn-34-10 --no-normalize --eps 0.031
t13-zhang2019b-released             | 84.92/-/53.08     | eval_aa.py checkpoints/model_cifar_wrn.pt --model wrn-34-10 --no-normalize --eps 0.031
t13-rice2020-released               | 85.34/-/53.42     | eval_aa.py checkpoints/Rice2020Overfitting.pt --model wrn-34-20 --eps 8/255
t13-huang2020-released              | 83.48/-/53.34     | eval_aa.py checkpoints/Huang2020Self.pt --model wrn-34-10 --no-normalize --eps 0.031
t13-zhang2020-released              | 84.52/-/53.51     | eval_aa.py checkpoints/Zhang2020Attacks.pt --model wrn-34-10 --no-normalize --eps 8/255
# Figure 1a: weight decay. The paper names 1e-4, 2e-4 and 5e-4; the other values, and that the two architectures are these, are assumptions.
f1a-r18-wd5e-5                      | -/-/-             | train_pgdat.py --wd 5e-5
f1a-r18-wd1e-4                      | -/-/-             | train_pgdat.py --wd 1e-4
f1a-r18-wd2e-4                      | -/-/-             | train_pgdat.py --wd 2e-4
f1a-r18-wd3e-4                      | -/-/-             | train_pgdat.py --wd 3e-4
f1a-r18-wd5e-4                      | 82.52/53.58/48.51 | = t2-base
f1a-r18-wd7e-4                      | -/-/-             | train_pgdat.py --wd 7e-4
f1a-r18-wd1e-3                      | -/-/-             | train_pgdat.py --wd 1e-3
f1a-wrn10-wd5e-5                    | -/-/-             | train_pgdat.py --model wrn-34-10 --wd 5e-5
f1a-wrn10-wd1e-4                    | 85.87/49.45/46.43 | = t8-wrn10-wd1e-4-relu-bntrain
f1a-wrn10-wd2e-4                    | 86.14/52.08/48.72 | = t8-wrn10-wd2e-4-relu-bntrain
f1a-wrn10-wd3e-4                    | -/-/-             | train_pgdat.py --model wrn-34-10 --wd 3e-4
f1a-wrn10-wd5e-4                    | 86.07/56.60/52.19 | = t8-wrn10-wd5e-4-relu-bntrain
f1a-wrn10-wd7e-4                    | -/-/-             | train_pgdat.py --model wrn-34-10 --wd 7e-4
f1a-wrn10-wd1e-3                    | -/-/-             | train_pgdat.py --model wrn-34-10 --wd 1e-3
# Figure 1b: the learning curves of three of them. The figures of Table 8's rows stand beside those of the figures that are the same run.
f1b-wd1e-4                          | 85.87/49.45/46.43 | = t8-wrn10-wd1e-4-relu-bntrain
f1b-wd2e-4                          | 86.14/52.08/48.72 | = t8-wrn10-wd2e-4-relu-bntrain
f1b-wd5e-4                          | 86.07/56.60/52.19 | = t8-wrn10-wd5e-4-relu-bntrain
# Figure 2: architectures. That they are those of Table 11 is an assumption.
f2-preactresnet-18                  | 82.52/53.58/48.51 | = t2-base
f2-preactresnet-50                  | -/-/-             | train_pgdat.py --model preactresnet-50
f2-senet-18                         | 82.20/54.01/48.72 | = t7-senet18-bntrain
f2-densenet-121                     | 85.38/56.22/51.58 | = t7-densenet121-bntrain
f2-densenet-201                     | -/-/-             | train_pgdat.py --model densenet-201
f2-googlenet                        | 83.97/53.76/48.73 | = t7-googlenet-bntrain
f2-dpn-26                           | 83.67/53.88/48.50 | = t7-dpn26-bntrain
f2-dpn-92                           | -/-/-             | train_pgdat.py --model dpn-92
f2-resnext-29                       | -/-/-             | train_pgdat.py --model resnext-29
f2-regnetx-200mf                    | -/-/-             | train_pgdat.py --model regnetx-200mf
f2-regnetx-400mf                    | -/-/-             | train_pgdat.py --model regnetx-400mf
f2-wrn-34-10                        | 86.07/56.60/52.19 | = t8-wrn10-wd5e-4-relu-bntrain
# Figure 3: early decay of the learning rate. 110 epochs are an assumption.
f3-wd1e-4                           | -/-/-             | train_pgdat.py --model wrn-34-10 --wd 1e-4 --lr-decay-epochs 40 45
f3-wd2e-4                           | -/-/-             | train_pgdat.py --model wrn-34-10 --wd 2e-4 --lr-decay-epochs 40 45
f3-wd5e-4                           | 86.07/56.60/52.19 | = t8-wrn10-wd5e-4-relu-bntrain
# Figure 4: standard training. The schedule, the default one, and the weight decays, which the paper does not name, are assumptions.
f4-wd1e-4                           | -/-/-             | train_pgdat.py --model wrn-34-10 --attack none --wd 1e-4 ; eval_aa.py --attacks none
f4-wd2e-4                           | -/-/-             | train_pgdat.py --model wrn-34-10 --attack none --wd 2e-4 ; eval_aa.py --attacks none
f4-wd5e-4                           | -/-/-             | train_pgdat.py --model wrn-34-10 --attack none --wd 5e-4 ; eval_aa.py --attacks none
# Table 1: PGD-AT, ResNet-18, under the schedules of 21 methods (not their losses). The table leaves open the BN mode (train here, but for
# Zhang et al. 2019b: Sections 1 and 3.2), the attack, its steps, its step size and eps (the default: 10 steps of 2/255 at 8/255). Further
# assumptions: decay factor 0.1, SGD with momentum (Nesterov for Carmon et al., as Section 3.2 says), warm-ups of 15 epochs where no
# length is given, 40 / 70 as in Table 2 where the attack stops early. A method that does not stop early (train) is judged by its last
# checkpoint. Where a method's own code says otherwise than Table 1 or than such an assumption, in a few words:
#   cai2018: the curriculum is over attack steps, not eps.       zhang2019b: 1 epoch at the lower rate in the paper's prose, 2 in the code.
#   wang2019: stops by the FOSC criterion, not misclassification. atzmon2019, pang2020a: Adam.       huang2020: no warm-up.
#   wong2020: its warm-up is the rising half of the one-cycle.   ding2020: decays to 0.09, 0.03, 0.009, which the row follows.
#   zhang2020: last decay x 0.5, which the row follows; tolerance rises after epochs 50 and 90; attacks in eval mode.
s1-madry2018                        | -/-/-             | train_pgdat.py --epochs 200 --lr-decay-epochs 100 150 --wd 2e-4 ; eval_aa.py --which last
s1-cai2018                          | -/-/-             | train_pgdat.py --epochs 300 --lr-decay-epochs 150 250 --batch-size 200 --wd 5e-4 --warmup-eps 15 ; eval_aa.py --which last
s1-zhang2019b                       | -/-/-             | train_pgdat.py --bn-mode eval --epochs 76 --lr-decay-epochs 75 --wd 2e-4
s1-wang2019                         | -/-/-             | train_pgdat.py --lr 0.01 --epochs 120 --lr-decay-epochs 60 100 --wd 1e-4 --early-stop-pgd 40 70 ; eval_aa.py --which last
s1-qin2019                          | -/-/-             | train_pgdat.py --epochs 110 --lr-decay-epochs 100 105 --batch-size 256 --wd 2e-4 --warmup-eps 15 ; eval_aa.py --which last
s1-mao2019                          | -/-/-             | train_pgdat.py --epochs 80 --lr-decay-epochs 50 60 --batch-size 50 --wd 2e-4 ; eval_aa.py --which last
s1-carmon2019                       | -/-/-             | train_pgdat.py --epochs 100 --lr-schedule cosine --batch-size 256 --wd 5e-4 --optimizer nesterov ; eval_aa.py --which last
s1-alayrac2019                      | -/-/-             | train_pgdat.py --lr 0.2 --epochs 64 --lr-decay-epochs 38 46 51 --wd 5e-4 ; eval_aa.py --which last
s1-shafahi2019b                     | -/-/-             | = s1-madry2018
s1-zhang2019a                       | -/-/-             | train_pgdat.py --lr 0.05 --epochs 105 --lr-decay-epochs 79 90 100 --batch-size 256 --wd 5e-4 ; eval_aa.py --which last
s1-zhang-wang2019                   | -/-/-             | train_pgdat.py --epochs 200 --lr-decay-epochs 60 90 --batch-size 60 --wd 2e-4 ; eval_aa.py --which last
s1-atzmon2019                       | -/-/-             | train_pgdat.py --lr 0.01 --epochs 100 --lr-decay-epochs 50 --batch-size 32 --wd 1e-4 ; eval_aa.py --which last
s1-wong2020                         | -/-/-             | train_pgdat.py --lr 0.2 --epochs 30 --lr-schedule onecycle --wd 5e-4 ; eval_aa.py --which last
s1-rice2020                         | -/-/-             | train_pgdat.py --epochs 200 --lr-decay-epochs 100 150 --wd 5e-4
s1-ding2020                         | -/-/-             | train_pgdat.py --lr 0.3 --epochs 128 --lr-decay-epochs 51 77 102 --lr-decay-factor 0.3 0.333333333 0.3 --wd 2e-4 ; eval_aa.py --which last
s1-pang2020a                        | -/-/-             | train_pgdat.py --lr 0.01 --epochs 200 --lr-decay-epochs 100 150 --batch-size 50 --wd 1e-4 ; eval_aa.py --which last
s1-zhang2020                        | -/-/-             | train_pgdat.py --epochs 120 --lr-decay-epochs 60 90 110 --lr-decay-factor 0.1 0.1 0.5 --wd 2e-4 --early-stop-pgd 40 70 ; eval_aa.py --which last
s1-huang2020                        | -/-/-             | train_pgdat.py --epochs 200 --lr-schedule cosine --batch-size 256 --wd 5e-4 --warmup-lr 15 ; eval_aa.py --which last
s1-cheng2020                        | -/-/-             | train_pgdat.py --epochs 200 --lr-decay-epochs 80 140 180 --wd 5e-4 ; eval_aa.py --which last
s1-lee2020                          | -/-/-             | = s1-madry2018
s1-xu2020                           | -/-/-             | train_pgdat.py --epochs 120 --lr-decay-epochs 60 90 --batch-size 256 --wd 1e-4 ; eval_aa.py --which last
# Ours: what do the clean passes that only log change? Beside each BN-mode row of ResNet-18, none of them.
x-r18-bntrain-clean0                | -/-/-             | train_pgdat.py --bn-clean-passes 0
x-r18-bneval-clean0                 | -/-/-             | train_pgdat.py --bn-mode eval --bn-clean-passes 0
# Ours: tricks since the paper, each on its default setting (t2-base). Others' figures are of settings near these, not of these.
# Weight averaging: 0.9995 a step at batch 128 is the FastAT benchmark's (github.com/fzjcdt/FastAT_Benchmark, configs/cifar10/pgd_at_wa.yaml);
# Gowal et al.'s 0.995 at batch 1024 forgets as fast per image (0.995^(1/8) = 0.9994). Replicated by others: FastAT, ResNet-18, 100 epochs
# one-cycle, smoothing 0.4, last epoch: 85.35/48.35/44.33 without averaging, 82.36/55.05/50.49 with it.
x-r18-ema                           | -/-/-             | train_pgdat.py --ema 0.9995
# Adversarial weight perturbation, with the sizes and starts of its authors' code (github.com/csdongxian/AWP), which counts TRADES's epochs
# from 1, so that its perturbation starts one epoch before ours. It repeats the natural pass in TRADES's loss; ours does not.
# Replicated by others, clean/-/AA: MTandHJ (PyTorch-Robust), post-activation ResNet-18, PGD-AT 82.32/-/49.88, TRADES 82.75/-/51.86.
x-r18-awp                           | -/-/-             | train_pgdat.py --awp 0.01
x-r18-ema-awp                       | -/-/-             | train_pgdat.py --ema 0.9995 --awp 0.01
x-trades-r18-awp                    | -/-/-             | train_trades.py --awp 0.005 --awp-warmup 10
# The same question at a CPU's scale: the first 10,000 training images of CIFAR-10 (python data/prepare.py head --n 10000), tested at the end only.
x-tiny-bneval-clean0                | -/-/-             | train_pgdat.py --model tiny --dataset data/cifar10_head10000.npz --epochs 12 --lr-decay-epochs 9 11 --bn-mode eval --bn-clean-passes 0 --eval-every 12 ; eval_aa.py --attacks none
x-tiny-bneval-clean2                | -/-/-             | train_pgdat.py --model tiny --dataset data/cifar10_head10000.npz --epochs 12 --lr-decay-epochs 9 11 --bn-mode eval --bn-clean-passes 2 --eval-every 12 ; eval_aa.py --attacks none
x-tiny-bntrain-clean2               | -/-/-             | train_pgdat.py --model tiny --dataset data/cifar10_head10000.npz --epochs 12 --lr-decay-epochs 9 11 --bn-mode train --bn-clean-passes 2 --eval-every 12 ; eval_aa.py --attacks none
# x-tiny-bneval-clean2 with weight averaging. Its 948 steps are few for 0.9995: 0.995 averages about the last 200, two and a half epochs.
x-tiny-bneval-ema                   | -/-/-             | train_pgdat.py --model tiny --dataset data/cifar10_head10000.npz --epochs 12 --lr-decay-epochs 9 11 --bn-mode eval --bn-clean-passes 2 --eval-every 12 --ema 0.995 ; eval_aa.py --attacks none
ROWS
}

die() {
    echo "run_all.sh: error: $*" >&2
    exit 2
}

# field ROW N: the N-th field of the row with that id, trimmed; fails if there is none.
field() {
    rows | awk -F'|' -v id="$1" -v n="$2" '{ i = $1; gsub(/ /, "", i) } i == id { gsub(/^ +| +$/, "", $n); print $n; found = 1 } END { exit !found }'
}

# distinct: the ids whose run is no other row's, but for the quickstarts, x-tiny and the released checkpoints.
distinct() {
    rows | awk -F'|' '$3 !~ /^ *=/ && $1 !~ /^quickstart|^x-tiny|-released *$/ { gsub(/ /, "", $1); print $1 }'
}

# matching PATTERN: the ids of the rows that match; one line of advice if there is none.
matching() {
    local id found=""
    while IFS= read -r id; do
        case $id in $1) echo "$id"; found=1 ;; esac
    done < <(rows | awk '{ print $1 }')
    [ -n "$found" ] || die "no row matches '$1'$(rows | awk -v q="'" -v p="${1%-}-" 'index($1, p) == 1 { print "; there are those of " q p "*" q; exit }')"
}

# runs_of PATTERN: the distinct runs that the matching rows need; `all`: those of all rows.
runs_of() {
    local ids id command
    [ "$1" != all ] || { distinct; return; }
    ids=$(matching "$1") || exit
    for id in $ids; do
        command=$(field "$id" 3)
        case $command in "= "*) echo "${command#= }" ;; *) echo "$id" ;; esac
    done | awk '!seen[$0]++'
}

# expand ROW...: the same rows, every pattern and `all` replaced by the runs that they need.
expand() {
    local row ids
    for row in "$@"; do
        case $row in
            *[*?[]*@*) ids=$(runs_of "${row%@*}") || exit; printf "%s@${row##*@}\n" $ids ;;
            *[*?[]* | all) runs_of "$row" ;;
            *) echo "$row" ;;
        esac
    done
}

# commands ROW[@SEED]: the command lines of a row, one a line; with $dry_run that of the training script alone.
commands() {
    local id=${1%@*} seed="" command
    case $1 in *@*) seed=${1##*@} ;; esac
    case $seed in *[!0-9]*) die "the seed of $1 is not a number" ;; esac
    if ! command=$(field "$id" 3); then
        local near
        near=$(rows | awk -F'|' -v text="$id" '{ gsub(/ /, "", $1) } index($1, text) { printf " %s", $1 }')
        die "no row $id${near:+; there is$near}"
    fi
    case $command in "= "*) id=${command#= }; command=$(field "$id" 3) ;; esac
    local out=runs/$id${seed:+@$seed} train evaluate
    case $command in
        eval_aa.py*)
            [ -z "$dry_run" ] || die "$1 trains nothing: --dry-run has nothing to show"
            echo $python $command ${seed:+--seed $seed} --out "$out/result.json"; return ;;
        *";"*) train=${command%%;*} evaluate=${command##*; eval_aa.py} ;;
        *) train=$command evaluate="" ;;
    esac
    echo $python $train ${seed:+--seed $seed} --out "$out" --resume $dry_run
    [ -n "$dry_run" ] || echo $python eval_aa.py "$out" $evaluate
}

# run ROW[@SEED]: executes its commands up to the first that fails. No command outlives this script: it ends with a Ctrl-C,
# which reaches it by itself, and with a SIGTERM, which is passed on. Its standard input is closed.
run() {
    local lines line child=""
    lines=$(commands "$1")
    trap 'kill $child 2>/dev/null; wait; exit 143' TERM
    trap 'wait; exit 130' INT
    while IFS= read -r line; do
        echo "+ $line"
        (trap - INT; exec $line) </dev/null &  # a background job ignores Ctrl-C otherwise
        child=$!
        wait $child || return
    done <<<"$lines"
}

# count: the rows of each table and figure (t2, f1a ...), and of all.
count() {
    rows | awk -F'|' '
        { gsub(/ /, "", $1); part = $1 ~ /-released$/ ? "released" : $1; sub(/-.*/, "", part) }
        !(part in n) { order[++parts] = part }
        { n[part]++ }
        END { for (i = 1; i <= parts; i++) print order[i], n[order[i]]; print "rows", NR }'
    echo "distinct runs $(distinct | wc -l | tr -d ' ')"
}

action=${1:-help} dry_run=""
[ $# -gt 0 ] && shift
case $action in
    list)
        ids=$(matching "${1:-*}")
        rows | awk -v ids="$ids" 'BEGIN { split(ids, all, "\n"); for (i in all) wanted[all[i]] } $1 in wanted' ;;
    ids)
        [ $# -gt 0 ] || set -- all
        ids=$(for pattern in "$@"; do runs_of "$pattern"; done)
        awk '!seen[$0]++' <<<"$ids" ;;
    count)
        count ;;
    cost)
        names=""
        while [ $# -gt 0 ]; do
            case $1 in -*) break ;; esac
            names+=" $1"; shift
        done
        [ -n "$names" ] || die "cost of which row? ./run_all.sh list shows them"
        set -f; ids=$(expand $names)
        ${PYTHON:-python} -m tools.bench --row $ids "$@" ;;
    print | run)
        if [ $# -eq 0 ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
            set -- "$(distinct | awk -v n="$SLURM_ARRAY_TASK_ID" 'NR == n')"
            [ -n "$1" ] || die "there is no run $SLURM_ARRAY_TASK_ID: they are 1 to $(distinct | wc -l | tr -d ' ')"
        fi
        names=()
        for row in "$@"; do
            if [ "$row" = --dry-run ]; then dry_run=$row; else names+=("$row"); fi
        done
        [ ${#names[@]} -gt 0 ] || die "$action which row? ./run_all.sh list shows them"
        ids=$(expand "${names[@]}")
        set -f; set -- $ids
        for row in "$@"; do commands "$row" >/dev/null; done  # all of them exist before the first is run
        failed=""
        for row in "$@"; do
            if [ "$action" = print ]; then commands "$row"; else run "$row" || failed+=" $row (exit status $?)"; fi
        done
        [ -z "$failed" ] || { echo "run_all.sh: failed:$failed" >&2; exit 1; } ;;
    help | -h | --help)
        sed -n '2,/^$/{s/^# \{0,1\}//;p;}' "$0" ;;
    *)
        die "unknown action $action: there is list, print, run, cost, ids, count" ;;
esac
