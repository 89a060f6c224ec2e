#!/bin/sh
# How long the first call of a product takes: with nothing compiled, and in a new process after that.
# sh first_call.sh NAME [OPTION...]   writes NAME_cold.json and NAME_warm.json; first_call_seconds is the column.
# OPTIONs of `abq bench kernels`; by default W3A6g64 and W5A7 on 4096x4096 with 1, 16 and 512 tokens.
set -eu
name=$1
shift
[ $# -gt 0 ] || set -- -s W3A6g64 -s W5A7 --shape 4096x4096 -m 1 -m 16 -m 512
ABQ_CACHE_DIR=$(mktemp -d)
export ABQ_CACHE_DIR
trap 'rm -rf "$ABQ_CACHE_DIR"' EXIT
for state in cold warm; do
    abq bench kernels --no-rivals --no-check "$@" --json "${name}_$state.json"
done
