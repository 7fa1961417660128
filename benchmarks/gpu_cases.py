"""The cases of `benchmark_gpu.py`: for each name, the options of train.py."""

COMPILE, BF16 = "--compile.enable true", "--training.dtype bfloat16"
TENSORWISE = f"{COMPILE} --float8.enable true --float8.recipe tensorwise"
ROWWISE = f"{COMPILE} --float8.enable true --float8.recipe rowwise"
RECOMPUTE = f"{COMPILE} --activation_checkpoint.mode"
CHUNK, BATCH, PLAIN = "--training.loss_chunk_size", "--training.local_batch_size", "plain"

# An interval is a few steps long, since reading the loss makes the GPU wait for the CPU.
SHORT = "--training.steps 6 --metrics.log_freq 2"  # logs steps 1, 2, 4, 6: two intervals count
FEW = "--training.steps 4 --metrics.log_freq 1"  # long steps
# The learning rate is as low as at the start of a warm-up: if the weights diverge, the GPU multiplies their numbers
# faster. The tokenizer's ids fit into any vocabulary.
ALL = "--optimizer.lr 1e-6 --data.dataset python_stdlib --data.tokenizer bpe_4096"
GLOBAL = "--training.global_batch_size"
FOUR_K, EIGHT_K = "--training.seq_len 4096", "--training.seq_len 8192"

GROUPS = {  # name: (options of all cases of the group, {case: (its options, PLAIN if a plain loop follows)})
    "1b": (
        f"--model.flavor llama3_1b --model.tie_embeddings false --training.seq_len 8192 {BATCH} 2 {SHORT}",
        {
            "compile": (COMPILE, PLAIN),
            "compile, float8 tensorwise": (TENSORWISE, PLAIN),
            "compile, pure bf16": (f"{COMPILE} {BF16}", PLAIN),
            "eager": ("",),
            "eager, pure bf16": (BF16,),
            "compile, float8 rowwise": (ROWWISE,),
            "compile, weights kept": (f"{COMPILE} --parallelism.fsdp_reshard_after_forward never",),
            **{f"compile, batch {n}, chunk 8192": (f"{COMPILE} {BATCH} {n} {CHUNK} 8192",) for n in (4, 8)},
        },
    ),
    "3b": (  # with tied embeddings, as published
        f"--model.flavor llama3_3b --training.seq_len 8192 {BATCH} 2 {SHORT}",
        {"compile": (COMPILE, PLAIN), "compile, float8 tensorwise": (TENSORWISE, PLAIN)},
    ),
    "8b_slice": (
        f"--model.flavor llama3_8b --model.n_layers 8 --training.seq_len 8192 {BATCH} 2 {SHORT}",
        {
            "compile": (COMPILE, PLAIN),
            "compile, float8 tensorwise": (TENSORWISE, PLAIN),
            "compile, pure bf16": (f"{COMPILE} {BF16}", PLAIN),
            "eager": ("",),
            "compile, AC full": (f"{RECOMPUTE} full",),
            "compile, AC selective": (f"{RECOMPUTE} selective",),
            "compile, AC budget 0.5": (f"{RECOMPUTE} memory_budget --activation_checkpoint.selective_option 0.5",),
            "compile, float8 all-gather": (f"{TENSORWISE} --float8.enable_fsdp_float8_all_gather true",),
            "compile, float8 rowwise": (ROWWISE,),
            "compile, chunk 0": (f"{COMPILE} {CHUNK} 0",),
            "compile, chunk 4096": (f"{COMPILE} {CHUNK} 4096",),
            "compile, chunk 8192": (f"{COMPILE} {CHUNK} 8192",),
            "compile, documents": (f"{COMPILE} --data.packing documents",),
            "compile, batch 4, float8 tensorwise": (f"{TENSORWISE} {BATCH} 4",),
            **{f"compile, batch {n}": (f"{COMPILE} {BATCH} {n}",) for n in (4, 8, 10, 12)},
        },
    ),
    "8b": (
        f"--model.flavor llama3_8b {BF16} {CHUNK} 4096 {SHORT}",
        {
            "4k, batch 2": (f"{COMPILE} {FOUR_K} {BATCH} 2 {GLOBAL} 8",),
            "4k, batch 3": (f"{COMPILE} {FOUR_K} {BATCH} 3 {GLOBAL} 12 {FEW}", PLAIN),
            "4k, batch 4": (f"{COMPILE} {FOUR_K} {BATCH} 4 {GLOBAL} 16 {FEW}",),
            "4k, batch 2, float8 tensorwise": (f"{TENSORWISE} {FOUR_K} {BATCH} 2 {GLOBAL} 8",),
            "4k, batch 4, float8 tensorwise": (f"{TENSORWISE} {FOUR_K} {BATCH} 4 {GLOBAL} 16 {FEW}", PLAIN),
            # KempnerForge's setting. Its trainer made 9,720 tokens/s on a card of this kind.
            "4k, batch 4, AC full": (f"{RECOMPUTE} full {FOUR_K} {BATCH} 4 {GLOBAL} 8", PLAIN),
            "8k, batch 1": (f"{COMPILE} {EIGHT_K} {BATCH} 1 {GLOBAL} 4",),
            "8k, batch 2": (f"{COMPILE} {EIGHT_K} {BATCH} 2 {GLOBAL} 8 {FEW}", PLAIN),
            "8k, batch 1, float8 tensorwise": (f"{TENSORWISE} {EIGHT_K} {BATCH} 1 {GLOBAL} 4",),
            "8k, batch 2, float8 tensorwise": (f"{TENSORWISE} {EIGHT_K} {BATCH} 2 {GLOBAL} 8 {FEW}", PLAIN),
        },
    ),
}
GROUPS["v2_lite"] = (  # one dense block and eight MoE blocks of DeepSeek-V2-Lite, with all experts on one GPU
    f"--model.flavor deepseek_v2_lite_16b --model.n_layers 9 {FOUR_K} {BATCH} 4 {BF16} {CHUNK} 4096 {SHORT}",
    {
        "compile": (COMPILE, PLAIN),
        "compile, float8 tensorwise": (TENSORWISE,),  # only linear layers: experts stay in bfloat16
        "eager": ("",),
        "compile, batch 8": (f"{COMPILE} {BATCH} 8",),
    },
)
# Options that make any case tiny, for a dry run.
DRY = "--job.device cpu --model.dim 64 --model.n_layers 2 --model.n_heads 4 --model.n_kv_heads 2 --model.hidden_dim 128"
DRY += " --model.vocab_size 4096 --training.seq_len 128"
DRY_MIXTURE = " --model.n_kv_heads 4 --model.kv_lora_rank 32 --model.qk_nope_head_dim 16 --model.qk_rope_head_dim 16"
DRY_MIXTURE += " --model.v_head_dim 16 --model.moe_hidden_dim 32 --model.n_experts 8"
