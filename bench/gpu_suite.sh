#!/usr/bin/env bash
# Everything that needs a GPU, in order of value and within nine minutes:
#
#     bench/gpu_suite.sh [--dry-run] OUT_DIR
#
# Runs from the checkout, without installation or network. It needs Python >= 3.11 with its headers and a C compiler
# (Triton's launchers), torch 2.11 (CUDA), triton 3.6, numpy and rich; for the tests also pytest and hypothesis;
# matplotlib only for a picture of the curves. No other package or wheel: no soundfile, torchaudio,
# torchvision or speech synthesizer. The C++ library is used if one is built, else left alone.
#
# OUT_DIR gets suite.log (written as it goes), results.json (status and seconds of each stage and all records, anew
# after each stage) and rest.tar.gz (the records apart, the tests' report, the training run). The exit status is 1 if a
# stage failed or ran out of time; the others run all the same.
#
# --dry-run                       only says what would run
# PYTHON=python3                  the interpreter
# PQK_FAST_SUITE_SECONDS=540      for everything
# PQK_FAST_SUITE_STAGES="a b"     only these stages, which then share all the time
# PQK_FAST_SUITE_DEVICE=cpu       tries all stages on the CPU, with tiny sizes and without torch.compile
# PQK_FAST_DATA=DIR               a folder in the layout of Speech Commands for the training run, else made-up words
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=0
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ $# -ne 1 ]; then echo "usage: bench/gpu_suite.sh [--dry-run] OUT_DIR" >&2; exit 2; fi
device=${PQK_FAST_SUITE_DEVICE:-cuda}
total=${PQK_FAST_SUITE_SECONDS:-540}
python=${PYTHON:-python3}
failed=0
planned=0
child=

if [ $dry = 0 ]; then
    mkdir -p "$1" || exit 2
    out=$(cd "$1" && pwd)
    work=$(mktemp -d) || exit 2
    log=$out/suite.log
    : > "$log"
    : > "$work/stages.tsv"
    trap 'rm -rf "$work"' EXIT
    trap 'kill "$child" 2> /dev/null; wait; keep; exit 143' TERM INT  # they come through, since a stage is waited for
else
    work=WORK
fi
cd "$root" || exit 2
export PYTHONPATH=$root PYTHONUNBUFFERED=1
compgen -G 'pqk_fast/_C*.so' > /dev/null || export PQK_FAST_NATIVE=0

# Seconds of the whole that a stage gets, as shares, in order of value. What a stage leaves goes to those after it.
stages=(smoke tests dual_forward fake_quant topk_mask int4 step overhead paper captured cell seeds)
declare -A share=([smoke]=45 [tests]=115 [dual_forward]=95 [fake_quant]=85)
share+=([topk_mask]=40 [int4]=30 [step]=45 [overhead]=60 [paper]=35 [captured]=30 [cell]=35 [seeds]=40)
chosen=${PQK_FAST_SUITE_STAGES:-${stages[*]}}
shares=0
for name in $chosen; do
    if [ -z "${share[$name]:-}" ]; then echo "no stage $name; there are: ${stages[*]}" >&2; exit 2; fi
    shares=$((shares + share[$name]))
done

# What there is so far, in OUT_DIR; each file is whole at any time.
keep() {
    "$python" bench/gather.py "$work" "$out/results.json" >> "$log" 2>&1 || failed=1
    tar -czf "$out/rest.new" --exclude=checkpoints --exclude=words -C "$work" . &&
        mv "$out/rest.new" "$out/rest.tar.gz"
}

# stage NAME COMMAND...: LIMIT in an argument becomes the seconds in which the command should be done by itself
stage() {
    local name=$1 status start=$SECONDS limit
    shift
    if [[ " $chosen " != *" $name "* ]]; then return; fi
    planned=$((planned + share[$name]))
    limit=$(((total - 10) * planned / shares - SECONDS))  # the last ten are for killing and packing
    if [ $dry = 1 ]; then
        limit=$(((total - 10) * share[$name] / shares))
        printf '%-14s %4d s  %s\n' "$name" "$limit" "${*//LIMIT/$((limit - 15))}"
        return
    fi
    printf '\n===== %s, at most %d s\n' "$name" "$limit" | tee -a "$log"
    # INT, so that what is stopped still says what it has; a stage that overran took a part of the next one's time
    timeout --signal=INT --kill-after=5 "$((limit > 5 ? limit : 5))" "${@//LIMIT/$((limit - 15))}" \
        < /dev/null >> "$log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    tail -n 14 "$log"
    if [ $status = 124 ] || [ $status = 137 ]; then echo "stopped after $((SECONDS - start)) s" | tee -a "$log"; fi
    [ $status = 0 ] || failed=1
    printf '%s\t%d\t%d\n' "$name" "$status" $((SECONDS - start)) >> "$work/stages.tsv"
    keep
}

# bench NAME OPTIONS...
bench() {
    local name=$1
    shift
    stage "$name" "$python" "bench/bench_$name.py" --device "$device" --cases cuda --budget LIMIT \
        --out "$work/$name.json" "$@"
}

# shellcheck disable=SC2016  # expanded by the inner shell
smoke='"$0" -m pqk_fast doctor && "$0" bench/smoke.py --device "$1"'
# shellcheck disable=SC2016
paper='data=${PQK_FAST_DATA:-}
if [ ! -d "$data/yes" ]; then data=$2/words; [ -d "$data/yes" ] || "$0" bench/made_up_words.py "$data"; fi &&
"$0" -m pqk_fast train --recipe demo --data "$data" --device "$1" --out "$2/$3" "${@:4}"'
# shellcheck disable=SC2016
cell='data=${PQK_FAST_DATA:-}; [ -d "$data/yes" ] || data=$2/words
"$0" -m pqk_fast reproduce table1 --cells kws-res8-narrow-w4-p90 --data "$data" --device "$1" --out "$2/$3" "${@:4}"'
workers=()
mapfile -t gpu_tests < <(grep -lE 'mark\.gpu|DEVICES|KERNEL_DEVICE' tests/test_*.py)

if [ "$device" = cpu ]; then
    brief=(--seconds 0.02 --threads 1 --without torch.compile)
    quick=("${brief[@]}" --shrink 1024)
    small=("${brief[@]}" --shrink 32)
    steps=(--shrink 32 --rounds 3 --threads 1)
    parts=("${steps[@]}" --model res8_narrow --without torch.compile)
    short=(--set phase1.steps=40 --set phase1.epoch_steps=20
        --set phase2.steps=20 --set phase2.epoch_steps=10 --set phase2.distill_start=5)
else
    export PQK_FAST_REQUIRE_GPU=1
    quick=(--seconds 1)
    small=(--seconds 1)
    steps=(--rounds 30)
    parts=(--rounds 20 --model res8_narrow)
    short=()
    # compiling takes most of the tests' time: with pytest-xdist, where there is one, several at a time
    if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n 6); fi
fi

stage smoke bash -c "$smoke" "$python" "$device"
stage tests "$python" -m pytest -q -m gpu -p no:cacheprovider "${workers[@]}" --durations=10 \
    --junitxml="$work/tests.xml" "${gpu_tests[@]}"
bench dual_forward "${small[@]}"
bench fake_quant "${quick[@]}"
bench topk_mask "${quick[@]}"
bench int4 "${quick[@]}"
bench step "${steps[@]}"
bench overhead "${parts[@]}"
stage paper bash -c "$paper" "$python" "$device" "$work" paper "${short[@]}"
stage captured bash -c "$paper" "$python" "$device" "$work" captured --capture "${short[@]}"
# a whole cell of Table 1, as fast as it goes: one seed, then three at a time
stage cell bash -c "$cell" "$python" "$device" "$work" cell --capture --seeds 1 --jobs 1 "${short[@]}"
stage seeds bash -c "$cell" "$python" "$device" "$work" seeds --capture --seeds 3 --jobs 3 "${short[@]}"

[ $dry = 0 ] || exit 0
{
    printf '\n%-14s %6s %8s\n' stage status seconds
    while IFS=$'\t' read -r name status seconds; do
        printf '%-14s %6d %8d\n' "$name" "$status" "$seconds"
    done < "$work/stages.tsv"
    echo "all: $SECONDS s; in $out: suite.log, results.json, rest.tar.gz"
} | tee -a "$log"
exit $failed
