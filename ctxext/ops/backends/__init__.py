"""Fast attention backends, one file for each; the tests compare all of them with `naive_attention`.

Each backend's `attention` takes q, k, v, pattern, document_starts and scale as `blocked.attention` does.

choice       which backend serves a call
blocked      SDPA calls on views of the tokens: any pattern, CPU and any GPU
varlen       FlashAttention over segments of any length: GPUs, bf16 and fp16
flex         compiled FlexAttention under a BlockMask: GPUs
segments     a batch as one row of tokens, cut into segments
runs         neighbouring segments of equal length, joined
views        strided views of the tokens, with gradients summed in one buffer
sdpa         one call of scaled_dot_product_attention
sink_logits  attention with learned sinks
"""
