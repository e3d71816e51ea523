#!/usr/bin/env bash
# The manifest: every row of the paper, and the exact command behind it.
#
#   ./run_all.sh list [PATTERN]     the rows:  id | clean/PGD-10/AA of the paper | command     (e.g. list 't2-*')
#   ./run_all.sh print ROW...       the commands that `run` would execute
#   ./run_all.sh run ROW...         train and evaluate them, one after the other, in runs/ROW; again: goes on, or says it is done
#   ./run_all.sh run all            all of them, but for the quickstart
#   ./run_all.sh count              how many rows and distinct runs there are
#   SLURM_ARRAY_TASK_ID=7 ./run_all.sh run        the seventh distinct run (sbatch --array=1-N, one row a GPU)
#
# ROW@S is the row with seed S, in a folder of its own. A row `= other` is the same run as the other. A row is trained by
# its command and evaluated on all test images; what follows a `;` is how it is evaluated instead. PYTHON names the interpreter.

set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}

rows() {
    cat <<'ROWS'
quickstart   | -/-/-             | train_pgdat.py --model tiny --dataset data/cifar10_mini.npz --bn-mode eval --epochs 12 --batch-size 32 --lr 0.05 --lr-schedule onecycle ; eval_aa.py --n 100
t2-base      | 82.52/53.58/48.51 | train_pgdat.py
t2-es-40-70  | 86.52/52.65/46.6  | train_pgdat.py --early-stop-pgd 40 70
t2-es-40-100 | 86.56/53.22/46.04 | train_pgdat.py --early-stop-pgd 40 100
t2-es-60-100 | 85.67/52.90/45.96 | train_pgdat.py --early-stop-pgd 60 100
t2-wulr-10   | 82.45/53.43/48.26 | train_pgdat.py --warmup-lr 10
t2-wulr-15   | 82.64/53.29/48.12 | train_pgdat.py --warmup-lr 15
t2-wulr-20   | 82.31/53.35/48.37 | train_pgdat.py --warmup-lr 20
t2-wueps-10  | 82.64/53.65/48.44 | train_pgdat.py --warmup-eps 10
t2-wueps-15  | 82.75/53.27/48.17 | train_pgdat.py --warmup-eps 15
t2-wueps-20  | 82.78/53.62/48.48 | train_pgdat.py --warmup-eps 20
t4-r18-ls0   | 82.52/53.58/48.51 | = t2-base
t4-r18-ls0.1 | 82.69/54.04/48.76 | train_pgdat.py --ls 0.1
t4-r18-ls0.2 | 82.73/54.22/49.20 | train_pgdat.py --ls 0.2
t4-r18-ls0.3 | 82.51/54.34/49.24 | train_pgdat.py --ls 0.3
t4-r18-ls0.4 | 82.39/54.13/48.83 | train_pgdat.py --ls 0.4
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

# distinct: the ids whose run is no other row's, the quickstart aside.
distinct() {
    rows | awk -F'|' '$3 !~ /^ *=/ && $1 !~ /^quickstart/ { gsub(/ /, "", $1); print $1 }'
}

# commands ROW[@SEED]: the command lines of a row, one a line.
commands() {
    local id=${1%@*} seed="" command train evaluate
    case $1 in *@*) seed=${1##*@} ;; esac
    case $seed in *[!0-9]*) die "the seed of $1 is not a number" ;; esac
    if ! command=$(field "$id" 3); then
        local near
        near=$(rows | awk -F'|' -v text="$id" '{ gsub(/ /, "", $1) } index($1, text) { printf " %s", $1 }')
        die "no row $id${near:+; there is$near}"
    fi
    case $command in "= "*) id=${command#= }; command=$(field "$id" 3) ;; esac
    train=${command%%;*} evaluate=""
    case $command in *";"*) evaluate=${command##*;} evaluate=${evaluate##* eval_aa.py} ;; esac
    local out=runs/$id${seed:+@$seed}
    echo $python $train ${seed:+--seed $seed} --out "$out" --resume
    echo $python eval_aa.py "$out" $evaluate
}

run() {
    local lines line
    lines=$(commands "$1")
    while IFS= read -r line; do
        echo "+ $line"
        $line </dev/null
    done <<<"$lines"
}

action=${1:-help}
[ $# -gt 0 ] && shift
case $action in
    list)
        rows | while IFS= read -r row; do
            id=${row%%|*}
            case ${id// /} in ${1:-*}) echo "$row" ;; esac
        done ;;
    count)
        echo "$(rows | grep -vc '^quickstart') rows, $(distinct | wc -l | tr -d ' ') distinct runs" ;;
    print | run)
        if [ $# -eq 0 ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
            set -- "$(distinct | sed -n "${SLURM_ARRAY_TASK_ID}p")"
            [ -n "$1" ] || die "there is no run $SLURM_ARRAY_TASK_ID: they are 1 to $(distinct | wc -l | tr -d ' ')"
        fi
        [ $# -gt 0 ] || die "$action which row? ./run_all.sh list shows them"
        [ "$1" = all ] && set -- $(distinct)
        for row in "$@"; do commands "$row" >/dev/null; done  # all of them exist before the first is run
        for row in "$@"; do
            if [ "$action" = run ]; then run "$row"; else commands "$row"; fi
        done ;;
    help | -h | --help)
        sed -n '2,/^$/{s/^# \{0,1\}//;p;}' "$0" ;;
    *)
        die "unknown action $action: there is list, print, run, count" ;;
esac
