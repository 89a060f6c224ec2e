#!/bin/sh
# Every record of the CUDA kernels of this machine's GPU, into the folder OUT. What is there is not measured again.
#
#     sh benchmarks/cuda_records.sh OUT [PART...]
#
# PARTs are correctness, kernels, first_call, perplexity, sanitizer; by default all. Only kernels and first_call measure time: the
# others may run on another GPU meanwhile.
# In the environment, all optional: JOBS, processes that compile (default: the cores, at most 14); CUTLASS, the library of
# benchmarks/cutlass/build.sh; COMMIT, where there is no git history; and MODEL, TEXT, CALIB for the perplexity beside the
# reference's (files of text; without MODEL it is left out); CASE_SECONDS, to draw cases no longer. Rivals that are not installed are left
# out, with a line.
set -u
out=$1
shift
parts=" ${*:-correctness kernels first_call perplexity sanitizer} "
mkdir -p "$out"
cores=$(nproc)
jobs=${JOBS:-$((cores < 14 ? cores : 14))}
commit=${COMMIT:+--commit $COMMIT}
cutlass=${CUTLASS:+--rival cutlass --cutlass $CUTLASS}
widths=$(for a in 4 8 16; do for w in 1 2 3 4 5 6 7 8; do echo "-s W${w}A$a"; done; done)
others='-s W2*A4 -s W2*A6 -s W2*A8 -s W2A2 -s W3A3 -s W5A5 -s W6A6 -s W7A7 -s W2A6 -s W3A6 -s W4A8g128 -s W2A8g64'

record() { # NAME COMMAND...: the command is given the file as the last argument
    file=$out/$1.json
    shift
    [ -e "$file" ] || "$@" "$file" || echo "failed: $*" >&2
}
wanted() { case $parts in *" $1 "*) ;; *) return 1 ;; esac; }
bench() { # NAME OPTION...
    name=$1
    shift
    record "$name" abq bench kernels --jobs "$jobs" $commit "$@" --json
}

set -f # a * is part of a scheme
if wanted correctness; then
    record cuda_correctness python benchmarks/cuda_correctness.py --cases 3000 --seconds "${CASE_SECONDS:-1e9}" --jobs "$jobs" $commit --out
fi
if wanted kernels; then
    bench kernels_7b --model-shapes 7b --rival torch $cutlass
    bench kernels_13b --model-shapes 13b --rival torch $cutlass --no-check
    bench kernels_30b --model-shapes 30b --rival torch $cutlass --no-check
    bench kernels_schemes --shape 11008x4096 --rival torch $widths $others -m 1 -m 8 -m 64 -m 2048
    bench kernels_humming --shape 11008x4096 --rival torch --rival humming -s W2A8 -s W4A8 -s W8A8 -s W2A16 -m 1 -m 8 -m 2048
    bench kernels_gemlite --shape 11008x4096 --rival torch --rival gemlite -s W2A16 -s W4A16g128 -s W8A8 -m 1 -m 16 -m 2048
fi
if wanted first_call && [ ! -e "$out/kernels_first_call_warm.json" ]; then
    sh benchmarks/first_call.sh "$out/kernels_first_call" -s W3A6g64 -s W5A7 --shape 4096x4096 -m 1 -m 16 -m 512 $commit
fi
if wanted perplexity && [ -n "${MODEL:-}" ]; then
    record backends_agree_cuda python benchmarks/backends_agree.py --model "$MODEL" --ppl "$TEXT" --calib "$CALIB" \
        --method gptq --scheme W8A8 --scheme W4A4 --scheme 'W2*A8g64' --scheme W4A16g64 --backend cuda $commit --out
fi
if wanted sanitizer && command -v compute-sanitizer >/dev/null; then
    check() { # NAME TOOL OPTION...
        file=$out/cuda_$1
        tool=$2
        shift 2
        compute-sanitizer --tool "$tool" python benchmarks/cuda_correctness.py "$@" --jobs 0 --largest 3e7 $commit \
            --out "$file.json" >"$file.txt" 2>&1
        tail -n 1 "$file.txt"
    }
    for tool in memcheck racecheck; do
        check $tool $tool --cases 60
        check ${tool}_a16 $tool --cases 30 --bits 16
    done
fi
