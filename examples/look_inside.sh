#!/usr/bin/env bash
# Look inside a model before and after retrofit: every probe, with pictures (docs/probes.md says how to read them).
#
#     examples/look_inside.sh         # `tiny`, a minute and a half on two CPU cores; all goes to ./runs/inside
#
# tiny becomes a hybrid whose layers 1 and 3 are full and lose their positions, and heals for 60 steps at its own
# 512 tokens with itself as teacher, with a checkpoint every 10 steps to follow its heads through.
set -euo pipefail
runs=runs/inside
rm -rf "$runs"
ctxext=${CTXEXT:-ctxext}

echo "== before and after"
$ctxext --quiet convert tiny --hybrid swa128-nope --out "$runs/hybrid"
small=(--set lora.alpha=curvature --set optimizer.learning_rate=1e-3 --set optimizer.warmup_steps=5) # tiny is narrow
short=(--steps 60 --set global_batch_size=8 --set micro_batch_size=8 --set memory.checkpoint=false)
$ctxext --quiet finetune "$runs/hybrid" --preset heal "${small[@]}" "${short[@]}" --set faults.save_steps=10 \
    --set faults.keep=6 --set faults.keep_at_end=true --out "$runs/healed"

echo "== every probe on both, the model before the retrofit beside the one after"
$ctxext probe "$runs/healed" all --compare tiny --preset smoke --ablate 2 --out "$runs/probes"

echo "== what becomes of heads while it heals"
$ctxext probe "$runs/healed" retrieval-trace qk-distance --preset smoke --out "$runs/trace"

echo "== one page"
$ctxext report "$runs/probes" "$runs/trace" --title "tiny, before and after retrofit" --out "$runs/report"
