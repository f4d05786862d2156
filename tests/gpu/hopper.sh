#!/usr/bin/env bash
# Everything about the Hopper kernel on one GPU, in about four minutes on an H200 with 16 cores:
#
#     bash tests/gpu/hopper.sh OUT [SECONDS]
#
# Checks and 20,000 random calls in processes beside one another, compute-sanitizer on small calls meanwhile; then, alone
# on the GPU, the speeds, and the kernels of others on the same lists (where they are installed). Leaves checks.log,
# random.log, sanitizer.log, speeds.log, peers.log and all.tgz (every log and JSON file) in OUT, after every part. SECONDS:
# after which checks and random calls begin nothing new, 100 if not said.
set -u
out=$1
limit=${2:-100}
work=$(mktemp -d)
python=${PYTHON:-python3}
mkdir -p "$out"
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

run() { # name, seconds, arguments of run.py
    local name=$1 seconds=$2
    shift 2
    timeout "$seconds" "$python" tests/gpu/run.py --out "$work/$name" "$@" >"$work/$name.txt" 2>&1
    echo "$name: exit $?, $SECONDS s, $(tail -n 1 "$work/$name.txt")"
}

sanitize() { # tool: the calls are compiled by then
    sleep 45
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 65 compute-sanitizer --tool "$1" "$python" tests/gpu/run.py \
        --out "$work/$1" --only sanitizer --seconds 50 >"$work/$1.txt" 2>&1
    echo "$1: exit $?, $SECONDS s, $(tail -n 1 "$work/$1.txt")"
}

collect() {
    for kind in checks random; do cat "$work/$kind"-*.txt >"$out/$kind.log"; done
    cat "$work"/memcheck.txt "$work"/racecheck.txt >"$out/sanitizer.log" 2>/dev/null
    for kind in speeds peers; do cp "$work/$kind.txt" "$out/$kind.log" 2>/dev/null; done
    tar -czf "$out/all.tgz" -C "$work" .
}

for i in 1 2 3 4 5 6; do run "checks-$i" $((limit + 20)) --only checks --kernel hopper --part "$i/6" --seconds "$limit" & done
for i in 1 2 3 4; do run "random-$i" $((limit + 20)) --only random --cases 20000 --part "$i/4" --seconds "$limit" & done
for i in 1 2 3 4; do run "compile-$i" $((limit + 20)) --only compile --part "$i/4" & done
sanitize memcheck &
sanitize racecheck &
wait
collect
run speeds 90 --only speeds --kernel hopper
collect
run peers 75 --only speeds --kernel peers
collect
grep -h "passed, \|FAILED" "$out"/*.log
