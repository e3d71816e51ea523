#!/usr/bin/env bash
# The manifest: a line a row of the paper, with its figures and its exact command. It is shell, and it is executed.
#
#   ./run_all.sh list [ROW...]    id | clean/PGD-10/AA of the paper | command
#   ./run_all.sh print ROW...     the commands that `run` executes, to be pasted into a shell
#   ./run_all.sh run ROW...       train and evaluate in runs/ROW, one after the other; again: goes on where it was
#   ./run_all.sh ids [ROW...]     the distinct runs that the rows need, one a line; without ROW: those of `all`
#
# ROW is an id; a table, t2; a quoted pattern, 't2-warmup-*'; or `all`: all rows but the quickstarts, x-laptop-... and the
# released checkpoints. ROW@S is with seed S, in runs/ID@S. A row `= other` is the same run as the other, and is
# run once. A run that fails is named at the end; the others are run all the same.
#
# Flags behind the rows go to the training script, --device to the evaluation too: run t2-base --precision bf16 --compile.
# With --dry-run it prints its setting, and nothing is trained or evaluated. --laptop, anywhere, is the rows at laptop scale
# (a tiny network, 2,500 images, 44 epochs), in runs/laptop/ROW. Rows that differ in their network alone are the same run
# there, each in its own folder: to run one of them is enough.
#
# PYTHON is what runs the scripts: an interpreter, or PYTHON="torchrun --nproc_per_node=8 --" for all of a machine's GPUs
# on one row; every batch has to split evenly then, an epoch's last one too, and --early-stop-pgd takes one process.
# All distinct runs of Table 2, one a GPU of a machine with eight:
#   ./run_all.sh ids t2 | xargs -P 8 -n 1 --process-slot-var=CUDA_VISIBLE_DEVICES ./run_all.sh run

set -euo pipefail
shopt -s extglob
self=$(readlink -f "$0")
cd "${self%/*}"

# row ID FIGURES COMMAND...: a run that COMMAND trains, and eval_aa.py evaluates with the flags in `evaluate`; or a released
# checkpoint that COMMAND, of eval_aa.py, evaluates. same ID FIGURES OTHER: the same run as the row OTHER.
ids=() figures=() commands=() evaluations=() evaluate=""  # not the environment's
row() { ids+=("$1") figures+=("$2") commands+=("${*:3}") evaluations+=("${evaluate:+ $evaluate}"); }
same() { row "$1" "$2" "= $3"; }

# Not in the paper: they show that everything works, on the embedded data.
evaluate="--n 50" row quickstart        -/-/- train_pgdat.py --model tiny --dataset data/cifar10_mini.npz --bn-mode eval --epochs 6 --batch-size 64 --lr-schedule onecycle --eval-every 3
evaluate="--n 50" row quickstart-trades -/-/- train_trades.py --model tiny --dataset data/cifar10_mini.npz --epochs 6 --batch-size 64 --lr-schedule onecycle --eval-every 3
# Table 2: early-stopped attack, warm-up of the learning rate, warm-up of eps; ResNet-18.
row t2-base              82.52/53.58/48.51 train_pgdat.py
row t2-early-stop-40-70  86.52/52.65/46.6  train_pgdat.py --early-stop-pgd 40 70
row t2-early-stop-40-100 86.56/53.22/46.04 train_pgdat.py --early-stop-pgd 40 100
row t2-early-stop-60-100 85.67/52.90/45.96 train_pgdat.py --early-stop-pgd 60 100
row t2-warmup-lr-10      82.45/53.43/48.26 train_pgdat.py --warmup-lr 10
row t2-warmup-lr-15      82.64/53.29/48.12 train_pgdat.py --warmup-lr 15
row t2-warmup-lr-20      82.31/53.35/48.37 train_pgdat.py --warmup-lr 20
row t2-warmup-eps-10     82.64/53.65/48.44 train_pgdat.py --warmup-eps 10
row t2-warmup-eps-15     82.75/53.27/48.17 train_pgdat.py --warmup-eps 15
row t2-warmup-eps-20     82.78/53.62/48.48 train_pgdat.py --warmup-eps 20
# Table 3: batch size, with the basic and the linearly scaled learning rate.
row  t3-r18-b64           80.08/51.31/- train_pgdat.py --batch-size 64
row  t3-r18-b64-scaled    82.44/52.48/- train_pgdat.py --batch-size 64 --lr 0.05
same t3-r18-b128          82.52/53.58/- t2-base
row  t3-r18-b256          83.33/52.20/- train_pgdat.py --batch-size 256
row  t3-r18-b256-scaled   82.24/52.52/- train_pgdat.py --batch-size 256 --lr 0.2
row  t3-r18-b512          83.40/50.69/- train_pgdat.py --batch-size 512
row  t3-r18-b512-scaled   82.16/53.36/- train_pgdat.py --batch-size 512 --lr 0.4
row  t3-wrn10-b64         84.20/54.69/- train_pgdat.py --model wrn-34-10 --batch-size 64
row  t3-wrn10-b64-scaled  85.40/54.86/- train_pgdat.py --model wrn-34-10 --batch-size 64 --lr 0.05
same t3-wrn10-b128        86.07/56.60/- t8-wrn10-wd5e-4-relu-bntrain
row  t3-wrn10-b256        86.21/52.90/- train_pgdat.py --model wrn-34-10 --batch-size 256
row  t3-wrn10-b256-scaled 85.89/56.09/- train_pgdat.py --model wrn-34-10 --batch-size 256 --lr 0.2
row  t3-wrn10-b512        86.29/50.17/- train_pgdat.py --model wrn-34-10 --batch-size 512
row  t3-wrn10-b512-scaled 86.47/55.49/- train_pgdat.py --model wrn-34-10 --batch-size 512 --lr 0.4
# Table 4: label smoothing.
same t4-r18-ls0     82.52/53.58/48.51 t2-base
row  t4-r18-ls0.1   82.69/54.04/48.76 train_pgdat.py --ls 0.1
row  t4-r18-ls0.2   82.73/54.22/49.20 train_pgdat.py --ls 0.2
row  t4-r18-ls0.3   82.51/54.34/49.24 train_pgdat.py --ls 0.3
row  t4-r18-ls0.4   82.39/54.13/48.83 train_pgdat.py --ls 0.4
same t4-wrn10-ls0   86.07/56.60/52.19 t8-wrn10-wd5e-4-relu-bntrain
row  t4-wrn10-ls0.1 85.96/56.88/52.74 train_pgdat.py --model wrn-34-10 --ls 0.1
row  t4-wrn10-ls0.2 86.09/57.31/53.00 train_pgdat.py --model wrn-34-10 --ls 0.2
row  t4-wrn10-ls0.3 85.99/57.55/52.70 train_pgdat.py --model wrn-34-10 --ls 0.3
row  t4-wrn10-ls0.4 86.19/57.63/52.71 train_pgdat.py --model wrn-34-10 --ls 0.4
# Table 5: optimisers; ResNet-18.
same t5-mom      82.52/53.58/48.51 t2-base
row  t5-nesterov 82.83/53.78/48.22 train_pgdat.py --optimizer nesterov
row  t5-adam     83.20/48.87/44.04 train_pgdat.py --optimizer adam
row  t5-adamw    81.68/46.58/42.39 train_pgdat.py --optimizer adamw
row  t5-sgd-gc   82.77/53.62/48.33 train_pgdat.py --optimizer sgd-gc
row  t5-sgd-gcc  82.93/53.40/48.51 train_pgdat.py --optimizer sgd-gcc
# Table 6: activations; ResNet-18. Those with a double dagger in the paper use weight decay 5e-5.
same t6-relu      82.52/53.58/- t2-base
row  t6-leakyrelu 82.11/53.25/- train_pgdat.py --activation leakyrelu
row  t6-elu       82.17/52.08/- train_pgdat.py --activation elu --wd 5e-5
row  t6-celu      81.37/51.37/- train_pgdat.py --activation celu --wd 5e-5
row  t6-selu      78.88/49.53/- train_pgdat.py --activation selu --wd 5e-5
row  t6-gelu      80.42/52.21/- train_pgdat.py --activation gelu
row  t6-softplus  82.80/54.30/- train_pgdat.py --activation softplus
row  t6-tanh      80.13/49.12/- train_pgdat.py --activation tanh --wd 5e-5
# Table 7: BN mode.
same t7-r18-bntrain         82.52/53.58/48.51 t2-base
row  t7-r18-bneval          83.48/53.64/48.75 train_pgdat.py --bn-mode eval
row  t7-senet18-bntrain     82.20/54.01/48.72 train_pgdat.py --model senet-18
row  t7-senet18-bneval      84.11/53.90/48.95 train_pgdat.py --model senet-18 --bn-mode eval
row  t7-densenet121-bntrain 85.38/56.22/51.58 train_pgdat.py --model densenet-121
row  t7-densenet121-bneval  86.33/56.11/51.24 train_pgdat.py --model densenet-121 --bn-mode eval
row  t7-googlenet-bntrain   83.97/53.76/48.73 train_pgdat.py --model googlenet
row  t7-googlenet-bneval    85.26/53.77/48.83 train_pgdat.py --model googlenet --bn-mode eval
row  t7-dpn26-bntrain       83.67/53.88/48.50 train_pgdat.py --model dpn-26
row  t7-dpn26-bneval        84.56/53.41/48.30 train_pgdat.py --model dpn-26 --bn-mode eval
same t7-wrn10-bntrain       86.07/56.60/52.19 t8-wrn10-wd5e-4-relu-bntrain
same t7-wrn10-bneval        87.38/56.04/51.93 t8-wrn10-wd5e-4-relu-bneval
# Table 8: combinations of tricks, PGD-AT.
row t8-wrn10-wd1e-4-relu-bntrain           85.87/49.45/46.43 train_pgdat.py --model wrn-34-10 --wd 1e-4 --bn-mode train
row t8-wrn10-wd2e-4-relu-bntrain           86.14/52.08/48.72 train_pgdat.py --model wrn-34-10 --wd 2e-4 --bn-mode train
row t8-wrn10-wd5e-4-relu-bntrain           86.07/56.60/52.19 train_pgdat.py --model wrn-34-10 --wd 5e-4 --bn-mode train
row t8-wrn10-wd5e-4-relu-bneval            87.38/56.04/51.93 train_pgdat.py --model wrn-34-10 --wd 5e-4 --bn-mode eval
row t8-wrn10-wd5e-4-softplus-bntrain       86.60/56.44/52.70 train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode train
row t8-wrn10-wd5e-4-softplus-bntrain-ls0.1 86.42/57.22/53.01 train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode train --ls 0.1
row t8-wrn10-wd5e-4-softplus-bneval-ls0.1  86.34/56.38/52.21 train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.1
row t8-wrn10-wd5e-4-softplus-bntrain-ls0.2 86.10/56.55/52.91 train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode train --ls 0.2
row t8-wrn10-wd5e-4-softplus-bneval-ls0.2  86.98/56.21/52.10 train_pgdat.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.2
row t8-wrn20-wd1e-4-relu-bntrain           86.21/49.74/47.58 train_pgdat.py --model wrn-34-20 --wd 1e-4 --bn-mode train
row t8-wrn20-wd2e-4-relu-bntrain           86.73/51.39/49.03 train_pgdat.py --model wrn-34-20 --wd 2e-4 --bn-mode train
row t8-wrn20-wd5e-4-relu-bntrain           86.97/57.57/53.26 train_pgdat.py --model wrn-34-20 --wd 5e-4 --bn-mode train
row t8-wrn20-wd5e-4-relu-bneval            87.62/57.04/53.14 train_pgdat.py --model wrn-34-20 --wd 5e-4 --bn-mode eval
row t8-wrn20-wd5e-4-softplus-bntrain       85.80/57.84/53.64 train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode train
row t8-wrn20-wd5e-4-softplus-bntrain-ls0.1 85.69/57.86/53.66 train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode train --ls 0.1
row t8-wrn20-wd5e-4-softplus-bneval-ls0.1  87.86/57.33/53.23 train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.1
row t8-wrn20-wd5e-4-softplus-bntrain-ls0.2 84.82/57.93/53.39 train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode train --ls 0.2
row t8-wrn20-wd5e-4-softplus-bneval-ls0.2  87.58/57.19/53.26 train_pgdat.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --ls 0.2
# Table 12: TRADES, ResNet-18; before Table 9, so that a run which both share at laptop scale has its name. Assumptions in
# both: beta 6 and the attack's step (2/255 at 8/255; 0.007 at 0.031, as in Zhang et al.'s code). The released codes have
# eval mode only: train mode is a reconstruction. 110 epochs are from the authors' README (of TRADES).
row t12-r18-wd5e-4-relu-bntrain     80.23/53.60/48.96 train_trades.py --wd 5e-4 --bn-mode train
row t12-r18-wd5e-4-softplus-bntrain 81.26/54.58/50.35 train_trades.py --wd 5e-4 --activation softplus --bn-mode train
row t12-r18-wd5e-4-relu-bneval      81.45/53.51/49.06 train_trades.py --wd 5e-4 --bn-mode eval
row t12-r18-wd5e-4-softplus-bneval  82.37/54.37/50.51 train_trades.py --wd 5e-4 --activation softplus --bn-mode eval
# Table 9: TRADES, WideResNets.
row t9-eps0.031-wrn10-wd2e-4-relu-bntrain    83.86/54.96/51.52 train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode train --eps 0.031 --alpha 0.007
row t9-eps0.031-wrn10-wd2e-4-relu-bneval     85.17/55.10/51.85 train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode eval --eps 0.031 --alpha 0.007
row t9-eps0.031-wrn10-wd5e-4-relu-bntrain    84.17/57.34/53.51 train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode train --eps 0.031 --alpha 0.007
row t9-eps0.031-wrn10-wd5e-4-relu-bneval     85.34/58.54/54.64 train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode eval --eps 0.031 --alpha 0.007
row t9-eps0.031-wrn10-wd5e-4-softplus-bneval 84.66/58.05/54.20 train_trades.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --eps 0.031 --alpha 0.007
row t9-eps0.031-wrn20-wd5e-4-relu-bneval     86.93/57.93/54.42 train_trades.py --model wrn-34-20 --wd 5e-4 --bn-mode eval --eps 0.031 --alpha 0.007
row t9-eps0.031-wrn20-wd5e-4-softplus-bneval 85.43/57.94/54.32 train_trades.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --eps 0.031 --alpha 0.007
row t9-eps8-wrn10-wd2e-4-relu-bntrain        84.50/54.60/50.94 train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode train --eps 8/255 --alpha 2/255
row t9-eps8-wrn10-wd2e-4-relu-bneval         85.17/54.58/51.54 train_trades.py --model wrn-34-10 --wd 2e-4 --bn-mode eval --eps 8/255 --alpha 2/255
row t9-eps8-wrn10-wd5e-4-relu-bntrain        84.04/57.41/53.83 train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode train --eps 8/255 --alpha 2/255
row t9-eps8-wrn10-wd5e-4-relu-bneval         85.48/57.45/53.80 train_trades.py --model wrn-34-10 --wd 5e-4 --bn-mode eval --eps 8/255 --alpha 2/255
row t9-eps8-wrn10-wd5e-4-softplus-bneval     84.24/57.59/53.88 train_trades.py --model wrn-34-10 --wd 5e-4 --activation softplus --bn-mode eval --eps 8/255 --alpha 2/255
row t9-eps8-wrn20-wd2e-4-relu-bntrain        84.50/53.86/51.18 train_trades.py --model wrn-34-20 --wd 2e-4 --bn-mode train --eps 8/255 --alpha 2/255
row t9-eps8-wrn20-wd2e-4-relu-bneval         85.48/53.21/50.59 train_trades.py --model wrn-34-20 --wd 2e-4 --bn-mode eval --eps 8/255 --alpha 2/255
row t9-eps8-wrn20-wd5e-4-relu-bntrain        85.87/57.40/54.22 train_trades.py --model wrn-34-20 --wd 5e-4 --bn-mode train --eps 8/255 --alpha 2/255
row t9-eps8-wrn20-wd5e-4-relu-bneval         86.43/57.91/54.39 train_trades.py --model wrn-34-20 --wd 5e-4 --bn-mode eval --eps 8/255 --alpha 2/255
row t9-eps8-wrn20-wd5e-4-softplus-bneval     85.51/57.50/54.21 train_trades.py --model wrn-34-20 --wd 5e-4 --activation softplus --bn-mode eval --eps 8/255 --alpha 2/255
# Table 13: the models of Table 9 that the paper enters in AutoAttack's benchmark; the authors' released checkpoints of them
# (linked from github.com/P2333/Bag-of-Tricks-for-AT); and those of the quoted methods that are public in PyTorch and whose
# architecture is here: model_cifar_wrn.pt from github.com/yaodongyu/TRADES, the other three by the names under which
# RobustBench (github.com/RobustBench/robustbench) stores them in models/cifar10/Linf. All take plain images but Rice et
# al.'s, which normalises as PGD-AT does here. Not here: Pang et al. 2020c (85.14/-/53.74: a network of its own, with
# normalised features and weights) and Qin et al. 2019 (86.28/-/52.84: a WRN-40-8, not released in PyTorch).
same t13-eps8-wrn20              86.43/-/54.39 t9-eps8-wrn20-wd5e-4-relu-bneval
same t13-eps8-wrn10              85.48/-/53.80 t9-eps8-wrn10-wd5e-4-relu-bneval
same t13-eps0.031-wrn10          85.34/-/54.64 t9-eps0.031-wrn10-wd5e-4-relu-bneval
row  t13-eps8-wrn20-released     86.43/-/54.39 eval_aa.py checkpoints/wide20_trades_eps8_tricks.pt --model wrn-34-20 --no-normalize --eps 8/255
row  t13-eps8-wrn10-released     85.48/-/53.80 eval_aa.py checkpoints/wide10_trades_eps8_tricks.pt --model wrn-34-10 --no-normalize --eps 8/255
row  t13-eps0.031-wrn10-released 85.34/-/54.64 eval_aa.py checkpoints/wide10_trades_tricks.pt --model wrn-34-10 --no-normalize --eps 0.031
row  t13-zhang2019b-released     84.92/-/53.08 eval_aa.py checkpoints/model_cifar_wrn.pt --model wrn-34-10 --no-normalize --eps 0.031
row  t13-rice2020-released       85.34/-/53.42 eval_aa.py checkpoints/Rice2020Overfitting.pt --model wrn-34-20 --eps 8/255
row  t13-huang2020-released      83.48/-/53.34 eval_aa.py checkpoints/Huang2020Self.pt --model wrn-34-10 --no-normalize --eps 0.031
row  t13-zhang2020-released      84.52/-/53.51 eval_aa.py checkpoints/Zhang2020Attacks.pt --model wrn-34-10 --no-normalize --eps 8/255
# Figure 1a: weight decay. The paper names 1e-4, 2e-4 and 5e-4; the other values and the two architectures are assumptions.
row  f1a-r18-wd5e-5   -/-/-             train_pgdat.py --wd 5e-5
row  f1a-r18-wd1e-4   -/-/-             train_pgdat.py --wd 1e-4
row  f1a-r18-wd2e-4   -/-/-             train_pgdat.py --wd 2e-4
row  f1a-r18-wd3e-4   -/-/-             train_pgdat.py --wd 3e-4
same f1a-r18-wd5e-4   82.52/53.58/48.51 t2-base
row  f1a-r18-wd7e-4   -/-/-             train_pgdat.py --wd 7e-4
row  f1a-r18-wd1e-3   -/-/-             train_pgdat.py --wd 1e-3
row  f1a-wrn10-wd5e-5 -/-/-             train_pgdat.py --model wrn-34-10 --wd 5e-5
same f1a-wrn10-wd1e-4 85.87/49.45/46.43 t8-wrn10-wd1e-4-relu-bntrain
same f1a-wrn10-wd2e-4 86.14/52.08/48.72 t8-wrn10-wd2e-4-relu-bntrain
row  f1a-wrn10-wd3e-4 -/-/-             train_pgdat.py --model wrn-34-10 --wd 3e-4
same f1a-wrn10-wd5e-4 86.07/56.60/52.19 t8-wrn10-wd5e-4-relu-bntrain
row  f1a-wrn10-wd7e-4 -/-/-             train_pgdat.py --model wrn-34-10 --wd 7e-4
row  f1a-wrn10-wd1e-3 -/-/-             train_pgdat.py --model wrn-34-10 --wd 1e-3
# Figure 1b: the learning curves of three of them.
same f1b-wd1e-4 85.87/49.45/46.43 t8-wrn10-wd1e-4-relu-bntrain
same f1b-wd2e-4 86.14/52.08/48.72 t8-wrn10-wd2e-4-relu-bntrain
same f1b-wd5e-4 86.07/56.60/52.19 t8-wrn10-wd5e-4-relu-bntrain
# Figure 2: architectures. That they are those of Table 11 is an assumption.
same f2-preactresnet-18 82.52/53.58/48.51 t2-base
row  f2-preactresnet-50 -/-/-             train_pgdat.py --model preactresnet-50
same f2-senet-18        82.20/54.01/48.72 t7-senet18-bntrain
same f2-densenet-121    85.38/56.22/51.58 t7-densenet121-bntrain
row  f2-densenet-201    -/-/-             train_pgdat.py --model densenet-201
same f2-googlenet       83.97/53.76/48.73 t7-googlenet-bntrain
same f2-dpn-26          83.67/53.88/48.50 t7-dpn26-bntrain
row  f2-dpn-92          -/-/-             train_pgdat.py --model dpn-92
row  f2-resnext-29      -/-/-             train_pgdat.py --model resnext-29
row  f2-regnetx-200mf   -/-/-             train_pgdat.py --model regnetx-200mf
row  f2-regnetx-400mf   -/-/-             train_pgdat.py --model regnetx-400mf
same f2-wrn-34-10       86.07/56.60/52.19 t8-wrn10-wd5e-4-relu-bntrain
# Figure 3: early decay of the learning rate. 110 epochs are an assumption.
row  f3-wd1e-4 -/-/-             train_pgdat.py --model wrn-34-10 --wd 1e-4 --lr-decay-epochs 40 45
row  f3-wd2e-4 -/-/-             train_pgdat.py --model wrn-34-10 --wd 2e-4 --lr-decay-epochs 40 45
same f3-wd5e-4 86.07/56.60/52.19 t8-wrn10-wd5e-4-relu-bntrain
# Figure 4: standard training. Assumptions: the schedule, the default one, and the weight decays, which the paper leaves open.
evaluate="--attacks none" row f4-wd1e-4 -/-/- train_pgdat.py --model wrn-34-10 --attack none --wd 1e-4
evaluate="--attacks none" row f4-wd2e-4 -/-/- train_pgdat.py --model wrn-34-10 --attack none --wd 2e-4
evaluate="--attacks none" row f4-wd5e-4 -/-/- train_pgdat.py --model wrn-34-10 --attack none --wd 5e-4
# Table 1: PGD-AT, ResNet-18, under the schedules of 21 methods (not their losses). The table leaves open the BN mode (train
# here, but for Zhang et al. 2019b: Sections 1 and 3.2) and the attack (the default). Further assumptions: decay factor 0.1,
# SGD with momentum (Nesterov for Carmon et al.: Section 3.2), warm-ups of 15 epochs where no length is given, 40 / 70 as in
# Table 2 where the attack stops early. A method that does not stop early (train) is judged by its last checkpoint.
# Where a method's own code says otherwise than this:
#   cai2018: the curriculum is over attack steps, not eps.         atzmon2019, pang2020a: Adam.       huang2020: no warm-up.
#   wang2019: stops by the FOSC criterion, not misclassification.  wong2020: its warm-up is the rising half of the one-cycle.
#   zhang2019b: 2 epochs at the lower rate (the paper's prose: 1). ding2020: decays to 0.09, 0.03, 0.009, as the row does.
#   zhang2020: last decay x 0.5, as in the row; tolerance rises after epochs 50 and 90; attacks in eval mode.
evaluate="--which last" row  s1-madry2018      -/-/- train_pgdat.py --epochs 200 --lr-decay-epochs 100 150 --wd 2e-4
evaluate="--which last" row  s1-cai2018        -/-/- train_pgdat.py --epochs 300 --lr-decay-epochs 150 250 --batch-size 200 --wd 5e-4 --warmup-eps 15
                        row  s1-zhang2019b     -/-/- train_pgdat.py --bn-mode eval --epochs 76 --lr-decay-epochs 75 --wd 2e-4
evaluate="--which last" row  s1-wang2019       -/-/- train_pgdat.py --lr 0.01 --epochs 120 --lr-decay-epochs 60 100 --wd 1e-4 --early-stop-pgd 40 70
evaluate="--which last" row  s1-qin2019        -/-/- train_pgdat.py --epochs 110 --lr-decay-epochs 100 105 --batch-size 256 --wd 2e-4 --warmup-eps 15
evaluate="--which last" row  s1-mao2019        -/-/- train_pgdat.py --epochs 80 --lr-decay-epochs 50 60 --batch-size 50 --wd 2e-4
evaluate="--which last" row  s1-carmon2019     -/-/- train_pgdat.py --epochs 100 --lr-schedule cosine --batch-size 256 --wd 5e-4 --optimizer nesterov
evaluate="--which last" row  s1-alayrac2019    -/-/- train_pgdat.py --lr 0.2 --epochs 64 --lr-decay-epochs 38 46 51 --wd 5e-4
                        same s1-shafahi2019b   -/-/- s1-madry2018
evaluate="--which last" row  s1-zhang2019a     -/-/- train_pgdat.py --lr 0.05 --epochs 105 --lr-decay-epochs 79 90 100 --batch-size 256 --wd 5e-4
evaluate="--which last" row  s1-zhang-wang2019 -/-/- train_pgdat.py --epochs 200 --lr-decay-epochs 60 90 --batch-size 60 --wd 2e-4
evaluate="--which last" row  s1-atzmon2019     -/-/- train_pgdat.py --lr 0.01 --epochs 100 --lr-decay-epochs 50 --batch-size 32 --wd 1e-4
evaluate="--which last" row  s1-wong2020       -/-/- train_pgdat.py --lr 0.2 --epochs 30 --lr-schedule onecycle --wd 5e-4
                        row  s1-rice2020       -/-/- train_pgdat.py --epochs 200 --lr-decay-epochs 100 150 --wd 5e-4
evaluate="--which last" row  s1-ding2020       -/-/- train_pgdat.py --lr 0.3 --epochs 128 --lr-decay-epochs 51 77 102 --lr-decay-factor 0.3 0.333333333 0.3 --wd 2e-4
evaluate="--which last" row  s1-pang2020a      -/-/- train_pgdat.py --lr 0.01 --epochs 200 --lr-decay-epochs 100 150 --batch-size 50 --wd 1e-4
evaluate="--which last" row  s1-zhang2020      -/-/- train_pgdat.py --epochs 120 --lr-decay-epochs 60 90 110 --lr-decay-factor 0.1 0.1 0.5 --wd 2e-4 --early-stop-pgd 40 70
evaluate="--which last" row  s1-huang2020      -/-/- train_pgdat.py --epochs 200 --lr-schedule cosine --batch-size 256 --wd 5e-4 --warmup-lr 15
evaluate="--which last" row  s1-cheng2020      -/-/- train_pgdat.py --epochs 200 --lr-decay-epochs 80 140 180 --wd 5e-4
                        same s1-lee2020        -/-/- s1-madry2018
evaluate="--which last" row  s1-xu2020         -/-/- train_pgdat.py --epochs 120 --lr-decay-epochs 60 90 --batch-size 256 --wd 1e-4
# Ours: what do the clean passes that only log change? Beside each BN-mode row of ResNet-18, none of them.
row x-r18-bntrain-clean0 -/-/- train_pgdat.py --bn-clean-passes 0
row x-r18-bneval-clean0  -/-/- train_pgdat.py --bn-mode eval --bn-clean-passes 0
# Ours: tricks since the paper, each on its default setting; results/README.md has others' figures of similar runs.
# Weight averaging: 0.9995 a step at batch 128 is the FastAT benchmark's (github.com/fzjcdt/FastAT_Benchmark,
# configs/cifar10/pgd_at_wa.yaml); Gowal et al.'s 0.995 at batch 1024 forgets as fast per image (0.995^(1/8) = 0.9994).
row x-r18-ema -/-/- train_pgdat.py --ema 0.9995
# Adversarial weight perturbation, with the sizes and starts of its authors' code (github.com/csdongxian/AWP). For TRADES
# theirs starts one epoch earlier, as it counts from 1, and repeats the natural pass in the loss.
row x-r18-awp        -/-/- train_pgdat.py --awp 0.01
row x-r18-ema-awp    -/-/- train_pgdat.py --ema 0.9995 --awp 0.01
row x-trades-r18-awp -/-/- train_trades.py --awp 0.005 --awp-warmup 10
# Ours: robust overfitting in twelve minutes on a laptop: the paper's 110 epochs on the first 1,000 training images. With
# more weight decay too, the paper's first trick.
evaluate="--attacks none" row x-laptop-overfitting     -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5
evaluate="--attacks none" row x-laptop-overfitting-ema -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --ema 0.99
evaluate="--attacks none" row x-laptop-overfitting-awp -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --awp 0.01
evaluate="--attacks none" row x-laptop-overfitting-ls  -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --ls 0.3
evaluate="--attacks none" row x-laptop-overfitting-wd1e-3 -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --wd 1e-3
evaluate="--attacks none" row x-laptop-overfitting-wd2e-3 -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --wd 2e-3
evaluate="--attacks none" row x-laptop-overfitting-wd5e-3 -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --wd 5e-3
evaluate="--attacks none" row x-laptop-overfitting-wd1e-2 -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --wd 1e-2
evaluate="--attacks none" row x-laptop-overfitting-wd2e-2 -/-/- train_pgdat.py --model tiny --n-train 1000 --eval-every 5 --wd 2e-2

# The rows that `all` stands for. They have a version at laptop scale.
all='!(quickstart*|x-laptop-*|*-released)'

die() { echo "run_all.sh: error: $*" >&2; exit 2; }

# match ROW...: puts the numbers of the rows that match into `found`.
match() {
    local i row pattern any
    found=()
    for row in "$@"; do
        any="" pattern=$row
        [[ $row == *-* || " ${ids[*]} " == *" $row "* ]] || pattern="$row?(-*)"  # a table: all of its rows
        [ "$row" != all ] || pattern=$all
        for i in "${!ids[@]}"; do [[ ${ids[i]} != $pattern ]] || found[i]=$i any=yes; done
        [ -n "$any" ] || die "no row matches '$row'${laptop:+ at laptop scale}"
    done
}

# scale_down: puts the rows at laptop scale. Of a flag that stands twice in a command the last one counts.
scale_down() {
    local i attacks
    for i in "${!ids[@]}"; do
        [[ ${ids[i]} == $all ]] || { unset "ids[i]"; continue; }
        [[ ${commands[i]} != "= "* ]] || continue
        [[ ${ids[i]} == t@(2|4|7|12)-* ]] && attacks="apgd-ce,apgd-t --error 0.7" || attacks=none
        commands[i]+=" --model tiny --n-train 2500 --time-scale 0.4 --eval-every 11"
        evaluations[i]+=" --attacks $attacks"
    done
}

# expand ROW...: puts the runs that the rows need, ID or ID@SEED, into `runs`, each once.
expand() {
    local i id row seed
    for row in "$@"; do
        [[ $row =~ ^([^@]*)(@[0-9]+)?$ ]] || die "the seed of $row is not a number"
        seed=${BASH_REMATCH[2]}
        match "${BASH_REMATCH[1]}"
        for i in "${found[@]}"; do
            id=${ids[i]}
            [[ ${commands[i]} != "= "* ]] || id=${commands[i]#= }
            [[ ${commands[i]} != eval_aa.py* || -z $flags ]] || die "$id trains nothing: it takes no$flags"
            [[ $runs == *" $id$seed "* ]] || runs+="$id$seed "
        done
    done
}

# command_lines RUN: what `print` prints and `run` executes for ID or ID@SEED.
command_lines() {
    local i seed="" out=runs/${laptop:+laptop/}$1 device="" command=$python
    match "${1%@*}"
    i=${found[*]}
    [[ $1 != *@* ]] || seed=" --seed ${1#*@}"
    # On so small a network a second thread gains little, and on a busy machine it costs a multiple.
    [[ (-z $laptop && $1 != quickstart*) || -n ${OMP_NUM_THREADS-} ]] || command="env OMP_NUM_THREADS=1 $python"
    if [[ ${commands[i]} == eval_aa.py* ]]; then
        echo "$command ${commands[i]}$seed --out $out/result.json"
    else
        # A finished run whose last.pt was deleted, to save space, has nothing left to train.
        [[ -f $out/best.pt && ! -f $out/last.pt ]] &&
            grep -qs "\"epochs\": $(grep -cs "" "$out/log.jsonl")," "$out/args.json" ||
            echo "$command ${commands[i]}$flags$seed --out $out --resume"
        [[ ! $flags =~ \ --device[\ =][^\ ]+ ]] || device=${BASH_REMATCH[0]}
        [[ "$flags " == *" --dry-run "* ]] || echo "$command eval_aa.py $out${evaluations[i]}$device"
    fi
}

# stop SIGNAL: ends with the command that runs. A Ctrl-C reaches that by itself, other signals are passed on as SIGTERM,
# since torchrun ends its processes at no USR1.
stop() {
    [ "$1" = INT ] || kill $(jobs -p) 2>/dev/null || true
    wait
    echo "run_all.sh: interrupted: $run${failed:+; failed:$failed}" >&2
    exit $((128 + $(kill -l "$1")))
}

action=${1:-help} python=${PYTHON:-python} laptop="" flags="" runs=" " run="" failed="" rows=()
for word in "${@:2}"; do
    if [ "$word" = --laptop ]; then laptop=yes
    elif [[ $word == --@(out|seed)?(=*) ]]; then die "$word: a row has a folder of its own, and ROW@S is the row with seed S"
    elif [[ $action == @(print|run) && (-n $flags || $word == --*) ]]; then printf -v flags "%s %q" "$flags" "$word"
    else rows+=("$word"); fi
done
[ -z "$laptop" ] || scale_down

case $action in
    list)
        match "${rows[@]-*}"
        for i in "${found[@]}"; do
            printf "%-40s | %-17s | %s\n" "${ids[i]}" "${figures[i]}" "${commands[i]}${evaluations[i]:+ ; eval_aa.py${evaluations[i]}}"
        done ;;
    ids) expand "${rows[@]-all}"; printf "%s\n" $runs ;;
    print | run)
        [ ${#rows[@]} -gt 0 ] || die "$action which row? ./run_all.sh list shows them"
        expand "${rows[@]}"
        for signal in INT HUP USR1 TERM; do trap "stop $signal" $signal; done  # Slurm sends USR1
        for run in $runs; do
            [ "$action" = run ] || { command_lines "$run"; continue; }
            while IFS= read -r line; do
                echo "+ $line"
                (trap - INT; eval "exec $line") </dev/null &  # a background job ignores Ctrl-C otherwise
                wait $! || { status=$?; [ $status != 130 ] || stop INT; failed+=" $run (exit status $status)"; break; }
            done < <(command_lines "$run")
        done
        [ -z "$failed" ] || { echo "run_all.sh: failed:$failed" >&2; exit 1; } ;;
    help | -h | --help) sed -n '2,/^$/{s/^# \{0,1\}//;p;}' "$self" ;;
    *) die "unknown action $action: there is list, print, run, ids" ;;
esac
