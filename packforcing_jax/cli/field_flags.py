"""Flags that programs of the field have, and what stands in their place here."""

STEPS = "the steps are settings: sample --steps N, or --set sample.steps=(1000,750,500,250)"
ROWS = (  # flags, and what to do instead
    (
        "height width size resolution aspect_ratio",
        "the size is the model's, in rows and columns of latent cells; --set latent=(ROWS,COLUMNS) changes it",
    ),
    (
        "num_frames frames frame_num video_length length duration num_output_frames",
        "the length is given with --seconds or --blocks",
    ),
    ("num_inference_steps sample_steps infer_steps denoising_step_list", STEPS),
    ("sampler scheduler sample_solver", f"the solver belongs to the model; {STEPS}"),
    ("shift flow_shift sample_shift", "it is a setting: --set sample.shift=5"),
    (
        "guide_scale sample_guide_scale cfg cfg_scale neg_prompt",
        "only method bidirectional is guided, by --guidance-scale and --negative-prompt; other models are distilled "
        "with their guidance inside",
    ),
    (
        "lora lora_path lora_weight lora_scale lora_alpha",
        "a LoRA is merged once: packforcing convert BASE LORA --out DIR, then --weights DIR",
    ),
    (
        "ckpt ckpt_dir ckpt_path checkpoint checkpoint_path model model_path model_id",
        "give a model folder with --weights; packforcing convert makes one of public weights",
    ),
    (
        "vae vae_path text_encoder t5 tokenizer",
        "all parts lie in one model folder: packforcing convert SOURCES --out DIR brings them there",
    ),
    (
        "dtype precision bf16 fp16 fp8 torch_dtype",
        "number formats are settings: --set dtypes.compute=bfloat16 --set dtypes.cache=bfloat16",
    ),
    (
        "device gpu cuda offload_model cpu_offload low_vram",
        "the device is chosen by the environment: JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=0",
    ),
    (
        "attention attn flash_attn use_sage_attention",
        "attention is a setting: --set attention=cudnn",
    ),
    (
        "image image_path i2v first_frame video init_image",
        "videos begin with text alone; images and videos to begin from are not read",
    ),
    (
        "output output_path output_dir output_folder save_file save_path",
        "the place of what is made is --out",
    ),
    (
        "prompt_file prompt_path prompts_file data_path",
        "many prompts are given with --prompts FILE, one per line",
    ),
    (
        "num_samples num_videos num_videos_per_prompt",
        "give --prompts FILE with a line and a seed for each video",
    ),
    ("fps frame_rate", "the rate is the model's; --set fps=16 changes it in the file"),
    ("random_seed base_seed generator_seed", "the seed is --seed"),
    ("batch_size", "training's batch is a setting: --set train.batch=8"),
    ("learning_rate lr", "training's rates are settings: --set train.generator.rate=2e-6"),
)
INSTEAD = {flag: remedy for flags, remedy in ROWS for flag in flags.split()}


def instead(flag: str) -> str | None:
    """What stands here in place of a flag of other programs, in any of its spellings; None for one nobody has."""
    return INSTEAD.get(flag.lstrip("-").replace("-", "_").lower())
