#!/usr/bin/env bash
# The whole way in five commands: convert, heal and extend, measure, merge, one page. examples/pipeline.py is the same
# from Python, to the digit.
#
#     examples/pipeline.sh            # `tiny`, about a minute on two CPU cores; everything goes to ./runs/pipeline
#
# It is kept short to be read and tried, and trains too little to show much: examples/retrofit.sh is the longer one.
set -euo pipefail
runs=runs/pipeline
rm -rf "$runs"
ctxext=${CTXEXT:-ctxext}

$ctxext convert tiny --hybrid swa128-nope --out "$runs/hybrid"
$ctxext finetune "$runs/hybrid" --preset heal-then-extend --ctx 512,2k --steps 16 \
    --set global_batch_size=8 --set micro_batch_size=8 --set memory.checkpoint=false \
    --set lora.alpha=curvature --set optimizer.learning_rate=3e-3 --set optimizer.warmup_steps=2 \
    --set validation.every_steps=null --out "$runs/healed" # tiny is narrow: its own scale and rate
$ctxext eval tiny "$runs/hybrid" "$runs/healed" --suite perplexity,passkey --lengths 512,2k --extrapolate \
    --set perplexity.limit=8192 --set passkey.limit=20 --out "$runs/eval"
$ctxext merge "$runs/healed" --out "$runs/merged"
$ctxext report "$runs/healed" "$runs/eval" --title "tiny, retrofitted" --out "$runs/report"
