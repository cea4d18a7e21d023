#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU should run, in stages of a few minutes, into one results folder.
#
#   bench/gpu.sh [--stages 1,3] [RESULTS]
#
# RESULTS, else $OUT, else bench/results/<date>-<gpu>. What is done for this state of the sources is skipped, so the
# script can be stopped at any time and called again. It runs from a checkout, without installation or network.
# PYTHON chooses the interpreter. ERRSEG_GPU_SH_DRY=1 prints the commands instead of running them.
set -uo pipefail

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

usage() {
    sed -n '2,8s/^# \{0,1\}//p' bench/gpu.sh
    cat <<'EOF'
Stages: 1 machine card, native libraries, quick verify   2 tests, GPU cases included   3 ops   4 blocks, head, post, loss
        5 model   6 train   7 compute-sanitizer   8 determinism over 20 runs
EOF
}

stages=1,2,3,4,5,6,7,8
results=${OUT:-}
while (($#)); do
    case $1 in
        --stages) (($# > 1)) || { usage >&2; exit 2; }; stages=$2; shift 2 ;;
        --stages=*) stages=${1#*=}; shift ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "error: no option $1" >&2; usage >&2; exit 2 ;;
        *) results=$1; shift ;;
    esac
done
[[ $stages =~ ^[1-8](,[1-8])*$ ]] || { echo "error: --stages takes numbers from 1 to 8, e.g. 1,3; got '$stages'" >&2; exit 2; }

[[ -z $results || $results == /* ]] || results=$caller/$results

python=${PYTHON:-python3}
dry=${ERRSEG_GPU_SH_DRY:-}
[[ $dry == 0 ]] && dry=

sources=(errseg kernels csrc bench tests setup.py pyproject.toml)

# The state of the sources: the commit, and what differs from it; without git the sources themselves.
source_key() {
    local commit changes
    if commit=$(git rev-parse --short=12 HEAD 2>/dev/null); then
        changes=$({ git diff HEAD -- "${sources[@]}" ':!bench/results'
            git ls-files -z --others --exclude-standard -- "${sources[@]}" ':!bench/results' |
                xargs -0 -r sha256sum; } | sha256sum)
        [[ $changes == "$(sha256sum </dev/null)" ]] && echo "$commit" || echo "$commit-${changes:0:12}"
    else
        find "${sources[@]}" -type f -not -path 'bench/results/*' -not -name '*.pyc' -print0 |
            sort -z | xargs -0 sha256sum | sha256sum | cut -c1-24
    fi
}

# The folder of an earlier call for these sources, else today's.
default_results() {
    local gpu folder
    gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 |
        tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-')
    gpu=${gpu%-}
    for folder in bench/results/*-"${gpu:-no-gpu}"; do
        [[ -e $folder/done/$key ]] && { echo "$folder"; return; }
    done
    echo "bench/results/$(date +%F)-${gpu:-no-gpu}"
}

key=$(source_key)
results=${results:-$(default_results)}
mkdir -p "$results/done/$key" "$results/logs" || exit 2

set -m # a step is a process group of its own, so that stopping reaches all of it
step_pid=

stop() {
    trap - INT TERM
    [[ -n $step_pid ]] && kill -TERM -- "-$step_pid" 2>/dev/null
    echo "stopped; what is done stays in $results, the same command goes on from here" >&2
    exit 130
}
trap stop INT TERM

failures=()

# step NAME COMMAND...: once per state of the sources; the log is kept, the stamp is set when the command succeeded.
step() {
    local name=$1 status start=$SECONDS
    shift
    if [[ -e $results/done/$key/$name ]]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    [[ -n $dry ]] && return
    (
        set -o pipefail
        "$@" 2>&1 | tee "$results/logs/$name.log"
    ) </dev/null &
    step_pid=$!
    wait "$step_pid"
    status=$?
    step_pid=
    if ((status == 0)); then
        date -u +%FT%TZ >"$results/done/$key/$name"
        echo "== $name: ok, $((SECONDS - start)) s"
    else
        failures+=("$name")
        echo "== $name: FAILED with exit code $status, $((SECONDS - start)) s" >&2
    fi
}

errseg() { "$python" -m errseg "$@"; }
bench() { errseg bench --device cuda --no-plots --out "$results" "$@"; }

machine_card() {
    nvidia-smi || true
    "$python" -m errseg info
}

# Compiles what is not compiled yet; fails when no op has a CUDA backend that runs.
native_libraries() {
    "$python" -c '
import sys
from errseg import ops
found = ops.backends()
for op, row in found.items():
    print(op, *(f"{name}: " + (reason or "runs") for name, reason in row.items()), sep="; ")
sys.exit(not any(row["cuda"] is None for row in found.values()))'
}

sanitizer() { compute-sanitizer --tool "$1" --error-exitcode 1 --print-limit 20 "$python" -m errseg.bench.sanitize; }

targets() { "$python" -c 'from errseg import ops; print(*ops.OPS)'; }

stage_1() {
    step machine machine_card
    step libraries native_libraries
    step verify-quick errseg verify --quick --device cuda
}
stage_2() { step tests "$python" -m pytest -q tests; }
stage_3() {
    local op
    for op in $(targets); do
        step "bench-$op" bench "$op" --dtype float32,bfloat16 --sweep
    done
}
stage_4() {
    step bench-blocks bench rrhc spatial_block class_block --dtype float32,bfloat16,autocast-bfloat16
    step bench-blocks-sweep bench rrhc spatial_block class_block --dtype bfloat16 --sweep
    step bench-head bench head labels --dtype float32,bfloat16,autocast-float16
    step bench-head-sweep bench head labels --dtype bfloat16 --sweep
    step bench-post bench post --dtype float32,bfloat16 --sweep
    step bench-loss bench loss --dtype float32,autocast-float16 --sweep
}
stage_5() { step bench-model bench model --dtype float32,bfloat16; }
stage_6() { step bench-train bench train prompts --dtype float32,autocast-float16; }
stage_7() {
    step memcheck sanitizer memcheck
    step racecheck sanitizer racecheck
}
stage_8() { step determinism "$python" -m errseg.bench.determinism --device cuda --runs 20; }

echo "results in $results, sources $key, stages $stages${dry:+ (dry: nothing is run)}"
for number in ${stages//,/ }; do
    echo "==== stage $number"
    "stage_$number"
done

plots() {
    "$python" -c '
import sys
from pathlib import Path
from errseg.bench.plots import draw_plots
from errseg.bench.rows import read_cards, read_rows
folder = Path(sys.argv[1])
machines = sorted({card["machine"] for card in read_cards(folder).values()})
print(len(draw_plots(read_rows(folder), folder / "plots", ", ".join(machines))), "plots")' "$results"
}
if [[ -z $dry && -e $results/rows.jsonl ]]; then
    plots || failures+=(plots)
fi

if ((${#failures[@]})); then
    echo "FAILED: ${failures[*]}; logs in $results/logs" >&2
    exit 1
fi
echo "all done: $results"
