"""What the tables of the paper say: typed from its text, row by row, and not derived from run_all.sh.

tests/test_manifest.py holds run_all.sh's manifest against it, so that a slip in either shows. Where they
disagree, read the paper again; never copy one into the other.

Source: Pang, Yang, Dong, Su, Zhu, "Bag of Tricks for Adversarial Training", ICLR 2021: Tables 1 to 9, 12 and
13, the captions of Figures 1 to 4, Sections 1, 3, 3.1, 3.2, Appendices A.3 and B.1. What a row needs beyond
that stands beside it as "assumed".

ROWS: id in the manifest -> (figures, settings). Figures are clean/PGD-10/AA in the paper's digits, "-" where
it prints none. Settings are what differs from the script's defaults, by the names in vars(args); besides,
"script" where it is train_trades.py and, in Table 1, "judged": the checkpoint that counts, "best" or "last".
SAME_SETTING: rows of the figures whose setting is also a table's row, and that row's figures.
UNSTATED: rows of Figure 1(a) whose weight decay the text does not give. RELEASED: released checkpoints of
Table 13's models. The manifest may have other rows too.

The paper's default setting (Section 3) is train_pgdat.py's: PGD-AT, ResNet-18, batch size 128, SGD with
momentum, lr 0.1, weight decay 5e-4, ReLU, no label smoothing, BN in train mode, 110 epochs, lr x 0.1 at 100
and 105, eps 8/255. train_trades.py's: ResNet-18, weight decay 5e-4, BN in eval mode, ReLU, eps 8/255. The
text names no step size, no number of steps in training and no beta: these are assumed everywhere.
"""

WRN10 = {"model": "wrn-34-10"}
WRN20 = {"model": "wrn-34-20"}
TRADES = {"script": "train_trades.py"}
TRADES10 = {"script": "train_trades.py", "model": "wrn-34-10"}
TRADES20 = {"script": "train_trades.py", "model": "wrn-34-20"}
EPS31 = {"eps": 0.031, "alpha": 0.007}  # assumed: the step, that of Zhang et al.'s (2019b) code
STANDARD10 = {"model": "wrn-34-10", "attack": "none"}

ROWS = {
    # Table 2: early stopping of the attack, warm-up of lr and of the perturbation. ResNet-18. 10 rows
    "t2-base": ("82.52/53.58/48.51", {}),
    "t2-early-stop-40-70": ("86.52/52.65/46.6", {"early_stop_pgd": [40, 70]}),
    "t2-early-stop-40-100": ("86.56/53.22/46.04", {"early_stop_pgd": [40, 100]}),
    "t2-early-stop-60-100": ("85.67/52.90/45.96", {"early_stop_pgd": [60, 100]}),
    "t2-warmup-lr-10": ("82.45/53.43/48.26", {"warmup_lr": 10}),
    "t2-warmup-lr-15": ("82.64/53.29/48.12", {"warmup_lr": 15}),
    "t2-warmup-lr-20": ("82.31/53.35/48.37", {"warmup_lr": 20}),
    "t2-warmup-eps-10": ("82.64/53.65/48.44", {"warmup_eps": 10}),
    "t2-warmup-eps-15": ("82.75/53.27/48.17", {"warmup_eps": 15}),
    "t2-warmup-eps-20": ("82.78/53.62/48.48", {"warmup_eps": 20}),

    # Table 3: batch size and learning rate, "basic" 0.1 or "scaled" by batch / 128. No AA. 7 + 7 rows
    "t3-r18-b64": ("80.08/51.31/-", {"batch_size": 64}),
    "t3-r18-b64-scaled": ("82.44/52.48/-", {"batch_size": 64, "lr": 0.05}),
    "t3-r18-b128": ("82.52/53.58/-", {}),
    "t3-r18-b256": ("83.33/52.20/-", {"batch_size": 256}),
    "t3-r18-b256-scaled": ("82.24/52.52/-", {"batch_size": 256, "lr": 0.2}),
    "t3-r18-b512": ("83.40/50.69/-", {"batch_size": 512}),
    "t3-r18-b512-scaled": ("82.16/53.36/-", {"batch_size": 512, "lr": 0.4}),
    "t3-wrn10-b64": ("84.20/54.69/-", {**WRN10, "batch_size": 64}),
    "t3-wrn10-b64-scaled": ("85.40/54.86/-", {**WRN10, "batch_size": 64, "lr": 0.05}),
    "t3-wrn10-b128": ("86.07/56.60/-", {**WRN10}),
    "t3-wrn10-b256": ("86.21/52.90/-", {**WRN10, "batch_size": 256}),
    "t3-wrn10-b256-scaled": ("85.89/56.09/-", {**WRN10, "batch_size": 256, "lr": 0.2}),
    "t3-wrn10-b512": ("86.29/50.17/-", {**WRN10, "batch_size": 512}),
    "t3-wrn10-b512-scaled": ("86.47/55.49/-", {**WRN10, "batch_size": 512, "lr": 0.4}),

    # Table 4: label smoothing. 5 + 5 rows
    "t4-r18-ls0": ("82.52/53.58/48.51", {}),
    "t4-r18-ls0.1": ("82.69/54.04/48.76", {"ls": 0.1}),
    "t4-r18-ls0.2": ("82.73/54.22/49.20", {"ls": 0.2}),
    "t4-r18-ls0.3": ("82.51/54.34/49.24", {"ls": 0.3}),
    "t4-r18-ls0.4": ("82.39/54.13/48.83", {"ls": 0.4}),
    "t4-wrn10-ls0": ("86.07/56.60/52.19", {**WRN10}),
    "t4-wrn10-ls0.1": ("85.96/56.88/52.74", {**WRN10, "ls": 0.1}),
    "t4-wrn10-ls0.2": ("86.09/57.31/53.00", {**WRN10, "ls": 0.2}),
    "t4-wrn10-ls0.3": ("85.99/57.55/52.70", {**WRN10, "ls": 0.3}),
    "t4-wrn10-ls0.4": ("86.19/57.63/52.71", {**WRN10, "ls": 0.4}),

    # Table 5: optimisers, lr 0.0001 for Adam and AdamW and 0.1 for the others. ResNet-18. 6 rows
    "t5-mom": ("82.52/53.58/48.51", {}),
    "t5-nesterov": ("82.83/53.78/48.22", {"optimizer": "nesterov"}),
    "t5-adam": ("83.20/48.87/44.04", {"optimizer": "adam", "lr": 0.0001}),
    "t5-adamw": ("81.68/46.58/42.39", {"optimizer": "adamw", "lr": 0.0001}),
    "t5-sgd-gc": ("82.77/53.62/48.33", {"optimizer": "sgd-gc"}),
    "t5-sgd-gcc": ("82.93/53.40/48.51", {"optimizer": "sgd-gcc"}),

    # Table 6: activations, a double dagger means weight decay 5e-5. ResNet-18. No AA. 8 rows
    "t6-relu": ("82.52/53.58/-", {}),
    "t6-leakyrelu": ("82.11/53.25/-", {"activation": "leakyrelu"}),
    "t6-elu": ("82.17/52.08/-", {"activation": "elu", "wd": 5e-5}),
    "t6-celu": ("81.37/51.37/-", {"activation": "celu", "wd": 5e-5}),
    "t6-selu": ("78.88/49.53/-", {"activation": "selu", "wd": 5e-5}),
    "t6-gelu": ("80.42/52.21/-", {"activation": "gelu"}),
    "t6-softplus": ("82.80/54.30/-", {"activation": "softplus"}),
    "t6-tanh": ("80.13/49.12/-", {"activation": "tanh", "wd": 5e-5}),

    # Table 7: BN mode while crafting. 6 models x 2 rows
    "t7-r18-bntrain": ("82.52/53.58/48.51", {}),
    "t7-r18-bneval": ("83.48/53.64/48.75", {"bn_mode": "eval"}),
    "t7-senet18-bntrain": ("82.20/54.01/48.72", {"model": "senet-18"}),
    "t7-senet18-bneval": ("84.11/53.90/48.95", {"model": "senet-18", "bn_mode": "eval"}),
    "t7-densenet121-bntrain": ("85.38/56.22/51.58", {"model": "densenet-121"}),
    "t7-densenet121-bneval": ("86.33/56.11/51.24", {"model": "densenet-121", "bn_mode": "eval"}),
    "t7-googlenet-bntrain": ("83.97/53.76/48.73", {"model": "googlenet"}),
    "t7-googlenet-bneval": ("85.26/53.77/48.83", {"model": "googlenet", "bn_mode": "eval"}),
    "t7-dpn26-bntrain": ("83.67/53.88/48.50", {"model": "dpn-26"}),
    "t7-dpn26-bneval": ("84.56/53.41/48.30", {"model": "dpn-26", "bn_mode": "eval"}),
    "t7-wrn10-bntrain": ("86.07/56.60/52.19", {**WRN10}),
    "t7-wrn10-bneval": ("87.38/56.04/51.93", {**WRN10, "bn_mode": "eval"}),

    # Table 8, WRN-34-10: label smoothing, weight decay, activation, BN mode. 9 rows
    "t8-wrn10-wd1e-4-relu-bntrain": ("85.87/49.45/46.43", {**WRN10, "wd": 1e-4}),
    "t8-wrn10-wd2e-4-relu-bntrain": ("86.14/52.08/48.72", {**WRN10, "wd": 2e-4}),
    "t8-wrn10-wd5e-4-relu-bntrain": ("86.07/56.60/52.19", {**WRN10}),
    "t8-wrn10-wd5e-4-relu-bneval": ("87.38/56.04/51.93", {**WRN10, "bn_mode": "eval"}),
    "t8-wrn10-wd5e-4-softplus-bntrain": ("86.60/56.44/52.70", {**WRN10, "activation": "softplus"}),
    "t8-wrn10-wd5e-4-softplus-bntrain-ls0.1": (
        "86.42/57.22/53.01", {**WRN10, "ls": 0.1, "activation": "softplus"}),
    "t8-wrn10-wd5e-4-softplus-bneval-ls0.1": (
        "86.34/56.38/52.21", {**WRN10, "ls": 0.1, "activation": "softplus", "bn_mode": "eval"}),
    "t8-wrn10-wd5e-4-softplus-bntrain-ls0.2": (
        "86.10/56.55/52.91", {**WRN10, "ls": 0.2, "activation": "softplus"}),
    "t8-wrn10-wd5e-4-softplus-bneval-ls0.2": (
        "86.98/56.21/52.10", {**WRN10, "ls": 0.2, "activation": "softplus", "bn_mode": "eval"}),
    # Table 8, WRN-34-20. 9 rows
    "t8-wrn20-wd1e-4-relu-bntrain": ("86.21/49.74/47.58", {**WRN20, "wd": 1e-4}),
    "t8-wrn20-wd2e-4-relu-bntrain": ("86.73/51.39/49.03", {**WRN20, "wd": 2e-4}),
    "t8-wrn20-wd5e-4-relu-bntrain": ("86.97/57.57/53.26", {**WRN20}),
    "t8-wrn20-wd5e-4-relu-bneval": ("87.62/57.04/53.14", {**WRN20, "bn_mode": "eval"}),
    "t8-wrn20-wd5e-4-softplus-bntrain": ("85.80/57.84/53.64", {**WRN20, "activation": "softplus"}),
    "t8-wrn20-wd5e-4-softplus-bntrain-ls0.1": (
        "85.69/57.86/53.66", {**WRN20, "ls": 0.1, "activation": "softplus"}),
    "t8-wrn20-wd5e-4-softplus-bneval-ls0.1": (
        "87.86/57.33/53.23", {**WRN20, "ls": 0.1, "activation": "softplus", "bn_mode": "eval"}),
    "t8-wrn20-wd5e-4-softplus-bntrain-ls0.2": (
        "84.82/57.93/53.39", {**WRN20, "ls": 0.2, "activation": "softplus"}),
    "t8-wrn20-wd5e-4-softplus-bneval-ls0.2": (
        "87.58/57.19/53.26", {**WRN20, "ls": 0.2, "activation": "softplus", "bn_mode": "eval"}),

    # Table 9: TRADES, eps = 0.031. 5 + 2 rows
    "t9-eps0.031-wrn10-wd2e-4-relu-bntrain": (
        "83.86/54.96/51.52", {**TRADES10, **EPS31, "wd": 2e-4, "bn_mode": "train"}),
    "t9-eps0.031-wrn10-wd2e-4-relu-bneval": ("85.17/55.10/51.85", {**TRADES10, **EPS31, "wd": 2e-4}),
    "t9-eps0.031-wrn10-wd5e-4-relu-bntrain": ("84.17/57.34/53.51", {**TRADES10, **EPS31, "bn_mode": "train"}),
    "t9-eps0.031-wrn10-wd5e-4-relu-bneval": ("85.34/58.54/54.64", {**TRADES10, **EPS31}),
    "t9-eps0.031-wrn10-wd5e-4-softplus-bneval": (
        "84.66/58.05/54.20", {**TRADES10, **EPS31, "activation": "softplus"}),
    "t9-eps0.031-wrn20-wd5e-4-relu-bneval": ("86.93/57.93/54.42", {**TRADES20, **EPS31}),
    "t9-eps0.031-wrn20-wd5e-4-softplus-bneval": (
        "85.43/57.94/54.32", {**TRADES20, **EPS31, "activation": "softplus"}),
    # Table 9: TRADES, eps = 8/255. 5 + 5 rows
    "t9-eps8-wrn10-wd2e-4-relu-bntrain": (
        "84.50/54.60/50.94", {**TRADES10, "wd": 2e-4, "bn_mode": "train"}),
    "t9-eps8-wrn10-wd2e-4-relu-bneval": ("85.17/54.58/51.54", {**TRADES10, "wd": 2e-4}),
    "t9-eps8-wrn10-wd5e-4-relu-bntrain": ("84.04/57.41/53.83", {**TRADES10, "bn_mode": "train"}),
    "t9-eps8-wrn10-wd5e-4-relu-bneval": ("85.48/57.45/53.80", {**TRADES10}),
    "t9-eps8-wrn10-wd5e-4-softplus-bneval": ("84.24/57.59/53.88", {**TRADES10, "activation": "softplus"}),
    "t9-eps8-wrn20-wd2e-4-relu-bntrain": (
        "84.50/53.86/51.18", {**TRADES20, "wd": 2e-4, "bn_mode": "train"}),
    "t9-eps8-wrn20-wd2e-4-relu-bneval": ("85.48/53.21/50.59", {**TRADES20, "wd": 2e-4}),
    "t9-eps8-wrn20-wd5e-4-relu-bntrain": ("85.87/57.40/54.22", {**TRADES20, "bn_mode": "train"}),
    "t9-eps8-wrn20-wd5e-4-relu-bneval": ("86.43/57.91/54.39", {**TRADES20}),
    "t9-eps8-wrn20-wd5e-4-softplus-bneval": ("85.51/57.50/54.21", {**TRADES20, "activation": "softplus"}),

    # Table 12: TRADES, eps = 8/255, ResNet-18. 4 rows
    "t12-r18-wd5e-4-relu-bntrain": ("80.23/53.60/48.96", {**TRADES, "bn_mode": "train"}),
    "t12-r18-wd5e-4-softplus-bntrain": (
        "81.26/54.58/50.35", {**TRADES, "bn_mode": "train", "activation": "softplus"}),
    "t12-r18-wd5e-4-relu-bneval": ("81.45/53.51/49.06", {**TRADES}),
    "t12-r18-wd5e-4-softplus-bneval": ("82.37/54.37/50.51", {**TRADES, "activation": "softplus"}),

    # Table 13, "Ours (TRADES)": Table 9's lines of weight decay 5e-4, eval BN and ReLU. No PGD-10. 3 rows
    "t13-eps8-wrn20": ("86.43/-/54.39", {**TRADES20}),
    "t13-eps8-wrn10": ("85.48/-/53.80", {**TRADES10}),
    "t13-eps0.031-wrn10": ("85.34/-/54.64", {**TRADES10, **EPS31}),

    # Figure 1(a): weight decay; the "three most commonly used", 1e-4, 2e-4 and 5e-4 (Section 3.2), on "two
    # model architectures". Assumed: that these two are Table 3's. 3 + 3 rows
    "f1a-r18-wd1e-4": ("-/-/-", {"wd": 1e-4}),
    "f1a-r18-wd2e-4": ("-/-/-", {"wd": 2e-4}),
    "f1a-r18-wd5e-4": ("-/-/-", {}),
    "f1a-wrn10-wd1e-4": ("-/-/-", {**WRN10, "wd": 1e-4}),
    "f1a-wrn10-wd2e-4": ("-/-/-", {**WRN10, "wd": 2e-4}),
    "f1a-wrn10-wd5e-4": ("-/-/-", {**WRN10}),

    # Figure 1(b): curves, WRN-34-10, weight decay 1e-4, 2e-4 and 5e-4. 3 rows
    "f1b-wd1e-4": ("-/-/-", {**WRN10, "wd": 1e-4}),
    "f1b-wd2e-4": ("-/-/-", {**WRN10, "wd": 2e-4}),
    "f1b-wd5e-4": ("-/-/-", {**WRN10}),

    # Figure 2: architectures. Assumed: the twelve of Table 11, which gives its circles' sizes. 12 rows
    "f2-densenet-121": ("-/-/-", {"model": "densenet-121"}),
    "f2-densenet-201": ("-/-/-", {"model": "densenet-201"}),
    "f2-regnetx-200mf": ("-/-/-", {"model": "regnetx-200mf"}),
    "f2-regnetx-400mf": ("-/-/-", {"model": "regnetx-400mf"}),
    "f2-dpn-26": ("-/-/-", {"model": "dpn-26"}),
    "f2-dpn-92": ("-/-/-", {"model": "dpn-92"}),
    "f2-preactresnet-18": ("-/-/-", {}),
    "f2-preactresnet-50": ("-/-/-", {"model": "preactresnet-50"}),  # "(PreAct) ResNet" in Appendix A.3
    "f2-googlenet": ("-/-/-", {"model": "googlenet"}),
    "f2-resnext-29": ("-/-/-", {"model": "resnext-29"}),
    "f2-senet-18": ("-/-/-", {"model": "senet-18"}),
    "f2-wrn-34-10": ("-/-/-", {**WRN10}),

    # Figure 3: WRN-34-10, lr decays at 40 and 45 "for the cases of weight decay 1e-4 and 2e-4", beside 5e-4,
    # which keeps 100 and 105. Assumed: 110 epochs. 3 rows
    "f3-wd1e-4": ("-/-/-", {**WRN10, "wd": 1e-4, "lr_decay_epochs": [40, 45]}),
    "f3-wd2e-4": ("-/-/-", {**WRN10, "wd": 2e-4, "lr_decay_epochs": [40, 45]}),
    "f3-wd5e-4": ("-/-/-", {**WRN10}),

    # Figure 4: WRN-34-10, standard training, "different values of weight decay". Assumed: that these are the
    # three of Figure 1(b), and the schedule, the default one. 3 rows
    "f4-wd1e-4": ("-/-/-", {**STANDARD10, "wd": 1e-4}),
    "f4-wd2e-4": ("-/-/-", {**STANDARD10, "wd": 2e-4}),
    "f4-wd5e-4": ("-/-/-", {**STANDARD10}),

    # Table 1: other methods' settings, in its order; it prints no accuracies. 21 rows
    # Assumed in all: PGD-AT of ResNet-18 at eps 8/255; SGD with momentum; decay by 0.1; BN in train mode (so
    # Section 3.2 of Madry et al. and Rice et al.); "best" where "Early stop (train)" is Yes, else "last".
    "s1-madry2018": ("-/-/-", {"epochs": 200, "lr_decay_epochs": [100, 150], "wd": 2e-4, "judged": "last"}),
    "s1-cai2018": ("-/-/-", {
        "epochs": 300, "lr_decay_epochs": [150, 250], "batch_size": 200,
        "warmup_eps": 15, "judged": "last"}),  # assumed: the length, which is Qin et al.'s
    "s1-zhang2019b": ("-/-/-", {
        "epochs": 76, "lr_decay_epochs": [75], "wd": 2e-4,
        "bn_mode": "eval",  # Sections 1 and 3.2
        "judged": "best"}),  # assumed: of its early stopping Section 3.1 says only that it stops at 76
    "s1-wang2019": ("-/-/-", {
        "lr": 0.01, "epochs": 120, "lr_decay_epochs": [60, 100], "wd": 1e-4,
        "early_stop_pgd": [40, 70], "judged": "last"}),  # assumed; Section 3.1: "different trigger rules"
    "s1-qin2019": ("-/-/-", {
        "batch_size": 256, "wd": 2e-4, "warmup_eps": 15, "judged": "last"}),  # 15: Section 3.1
    "s1-mao2019": ("-/-/-", {
        "epochs": 80, "lr_decay_epochs": [50, 60], "batch_size": 50, "wd": 2e-4, "judged": "last"}),
    "s1-carmon2019": ("-/-/-", {
        "epochs": 100, "lr_schedule": "cosine", "batch_size": 256,
        "optimizer": "nesterov", "judged": "last"}),  # optimizer: Section 3.2
    "s1-alayrac2019": ("-/-/-", {"lr": 0.2, "epochs": 64, "lr_decay_epochs": [38, 46, 51], "judged": "last"}),
    "s1-shafahi2019b": ("-/-/-", {
        "epochs": 200, "lr_decay_epochs": [100, 150], "wd": 2e-4, "judged": "last"}),
    "s1-zhang2019a": ("-/-/-", {
        "lr": 0.05, "epochs": 105, "lr_decay_epochs": [79, 90, 100], "batch_size": 256, "judged": "last"}),
    "s1-zhang-wang2019": ("-/-/-", {
        "epochs": 200, "lr_decay_epochs": [60, 90], "batch_size": 60, "wd": 2e-4, "judged": "last"}),
    "s1-atzmon2019": ("-/-/-", {
        "lr": 0.01, "epochs": 100, "lr_decay_epochs": [50], "batch_size": 32, "wd": 1e-4, "judged": "last"}),
    "s1-wong2020": ("-/-/-", {
        "lr": 0.2, "epochs": 30, "lr_schedule": "onecycle",  # l.r. is "0~0.2"
        "judged": "last"}),  # assumed: its warm-up (l.r.: Yes) is the rising half of that cycle
    "s1-rice2020": ("-/-/-", {"epochs": 200, "lr_decay_epochs": [100, 150], "judged": "best"}),
    "s1-ding2020": ("-/-/-", {
        "lr": 0.3, "epochs": 128, "lr_decay_epochs": [51, 77, 102], "wd": 2e-4, "judged": "last"}),
    "s1-pang2020a": ("-/-/-", {
        "lr": 0.01, "epochs": 200, "lr_decay_epochs": [100, 150], "batch_size": 50, "wd": 1e-4,
        "judged": "last"}),
    "s1-zhang2020": ("-/-/-", {
        "epochs": 120, "lr_decay_epochs": [60, 90, 110], "wd": 2e-4,
        "early_stop_pgd": [40, 70], "judged": "last"}),  # assumed: 40 / 70, the first of Table 2's three
    "s1-huang2020": ("-/-/-", {
        "epochs": 200, "lr_schedule": "cosine", "batch_size": 256,
        "warmup_lr": 15, "judged": "last"}),  # assumed: the length
    "s1-cheng2020": ("-/-/-", {"epochs": 200, "lr_decay_epochs": [80, 140, 180], "judged": "last"}),
    "s1-lee2020": ("-/-/-", {"epochs": 200, "lr_decay_epochs": [100, 150], "wd": 2e-4, "judged": "last"}),
    "s1-xu2020": ("-/-/-", {
        "epochs": 120, "lr_decay_epochs": [60, 90], "batch_size": 256, "wd": 1e-4, "judged": "last"}),
}

# The figures print no digits. These rows have a table row's setting.
SAME_SETTING = {
    "f1a-r18-wd5e-4": "82.52/53.58/48.51",  # Table 2
    "f1a-wrn10-wd1e-4": "85.87/49.45/46.43",  # Table 8
    "f1a-wrn10-wd2e-4": "86.14/52.08/48.72",
    "f1a-wrn10-wd5e-4": "86.07/56.60/52.19",
    "f1b-wd1e-4": "85.87/49.45/46.43",
    "f1b-wd2e-4": "86.14/52.08/48.72",
    "f1b-wd5e-4": "86.07/56.60/52.19",
    "f2-densenet-121": "85.38/56.22/51.58",  # Table 7, BN mode train
    "f2-dpn-26": "83.67/53.88/48.50",
    "f2-preactresnet-18": "82.52/53.58/48.51",
    "f2-googlenet": "83.97/53.76/48.73",
    "f2-senet-18": "82.20/54.01/48.72",
    "f2-wrn-34-10": "86.07/56.60/52.19",
    "f3-wd5e-4": "86.07/56.60/52.19",  # Table 8
}

UNSTATED = (
    "f1a-r18-wd5e-5", "f1a-r18-wd3e-4", "f1a-r18-wd7e-4", "f1a-r18-wd1e-3",
    "f1a-wrn10-wd5e-5", "f1a-wrn10-wd3e-4", "f1a-wrn10-wd7e-4", "f1a-wrn10-wd1e-3",
)

# Evaluated, not trained: settings by the names of eval_aa.py's flags. The authors' evaluator normalises no
# TRADES model.
PLAIN = {"no_normalize": True}
RELEASED = {
    "t13-eps8-wrn20-released": ("86.43/-/54.39", {**PLAIN, "model": "wrn-34-20", "eps": 8 / 255}),
    "t13-eps8-wrn10-released": ("85.48/-/53.80", {**PLAIN, "model": "wrn-34-10", "eps": 8 / 255}),
    "t13-eps0.031-wrn10-released": ("85.34/-/54.64", {**PLAIN, "model": "wrn-34-10", "eps": 0.031}),
    "t13-zhang2019b-released": ("84.92/-/53.08", {**PLAIN, "model": "wrn-34-10", "eps": 0.031}),
    "t13-rice2020-released": ("85.34/-/53.42", {"model": "wrn-34-20", "eps": 8 / 255}),
    "t13-huang2020-released": ("83.48/-/53.34", {**PLAIN, "model": "wrn-34-10", "eps": 0.031}),
    "t13-zhang2020-released": ("84.52/-/53.51", {**PLAIN, "model": "wrn-34-10", "eps": 8 / 255}),
}
