#!/usr/bin/env bash
# The speed benchmark on one large GPU, half precision: bash eval/gpu.sh [folder]. It has not been run so far: vtc is
# built on a machine without one. Shapes with random weights; nothing is downloaded. About 20 GB for a batch of one.
# First it counts how often a pruned forward waits for the device (tests/test_cuda.py).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-eval/results/bench/$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr -cs 'A-Za-z0-9\n' '-')}
vtc=.venv/bin/vtc
python=.venv/bin/python

"$python" -m pytest -q -n0 tests/test_cuda.py
kernels=sdpa
if "$python" -c 'import flash_attn' 2>/dev/null; then kernels="sdpa flash_attention_2"; fi
for attention in $kernels; do
    methods=vtc-cls,fastv,random
    if [ "$attention" = sdpa ]; then methods=$methods,tome; fi # its keys carry weights, which flash attention cannot do
    common=(--device cuda --dtype bfloat16 --attention "$attention" --new-tokens 32 --rounds 5)
    for batch in 1 8 32; do
        "$vtc" bench --model llava-1.5-7b --methods "$methods" --budgets 192,128,64 --batch $batch "${common[@]}" \
            --out "$out/llava-1.5-7b-$attention-$batch"
        # fractions, as tiles count newlines, too: 640, 320 and 160 of 2880; the last is below what fastv can do
        "$vtc" bench --model llava-next-7b --methods "$methods" --budgets 22.2%,11.1% --batch $batch \
            "${common[@]}" --out "$out/llava-next-7b-$attention-$batch"
        "$vtc" bench --model llava-next-7b --methods "${methods/fastv,/}" --budgets 5.6% --batch $batch \
            "${common[@]}" --out "$out/llava-next-7b-$attention-$batch-least"
    done
done
for model in llava-qwen2-0.5b llava-1.5-7b; do # where launches bind
    "$vtc" bench --compile --model $model --methods vtc-cls,fastv --budgets 64 --device cuda --dtype bfloat16 \
        --new-tokens 32 --rounds 3 --out "$out/$model-compiled"
done
for batch in 1 8; do
    "$vtc" peers --model llava-1.5-7b --budgets 64 --batch $batch --device cuda --dtype bfloat16 \
        --out "$out/peers-$batch"
done
"$vtc" load --model llava-1.5-7b --device cuda --dtype bfloat16 --clients 1,4,12 --budgets 0.25,0.11 --requests 96 \
    --new-tokens 64 --out "$out/load"
"$vtc" throughput --model llava-1.5-7b --device cuda --dtype bfloat16 --out "$out"
