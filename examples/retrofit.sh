#!/usr/bin/env bash
# A model made long by retrofit, start to end: which layers, convert, heal, extend, look, merge; beside the plain route.
#
#     examples/retrofit.sh            # `tiny`, about five minutes on two CPU cores; everything goes to ./runs/retrofit
#
# tiny was trained at 512 tokens. Read it as a recipe: put your model, its length and your text in their place.
set -euo pipefail
runs=runs/retrofit
rm -rf "$runs"
ctxext=${CTXEXT:-ctxext}

echo "== which layers stay full: measured, not guessed"
$ctxext convert tiny --hybrid swa128-nope --full-layers auto --explain --out "$runs/hybrid"

echo "== what a healing run would take, without running it"
$ctxext finetune "$runs/hybrid" --preset heal-then-extend --ctx 512,2k --plan

echo "== heal at 512 tokens with itself as teacher, then extend to 2,048"
small=(--set lora.alpha=curvature --set optimizer.learning_rate=1e-3 --set optimizer.warmup_steps=5) # tiny is narrow
short=(--steps 60 --set global_batch_size=8 --set micro_batch_size=8 --set memory.checkpoint=false)
$ctxext finetune "$runs/hybrid" --preset heal-then-extend --ctx 512,2k "${small[@]}" "${short[@]}" --out "$runs/healed"

echo "== the plain route: YaRN and S²-Attn at 2,048"
$ctxext finetune tiny --preset demo-plain --out "$runs/plain"

echo "== before and after"
$ctxext eval tiny "$runs/plain" "$runs/hybrid" "$runs/healed" --suite perplexity,passkey --lengths 512,1k,2k,4k \
    --extrapolate --limit 16k --out "$runs/eval"

echo "== an ordinary checkpoint, at the strength that held-out text likes best"
$ctxext merge "$runs/healed" --alpha-multiplier auto --out "$runs/merged"
