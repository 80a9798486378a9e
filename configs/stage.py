"""The Stage world's model: what ships in the package and samples anywhere. It is not Wan2.1.

packforcing train --config stage --out runs/stage        # 1.3 s a step on one CPU core: about two hours
"""

from packforcing_jax.config import (
    PROFILES,
    CompressorConfig,
    CoverConfig,
    DiTConfig,
    Experiment,
    OptimiserConfig,
    SampleConfig,
    SpaceToDepthConfig,
    TextConfig,
    TrainConfig,
)

MUON = OptimiserConfig(
    kind="muon", matrix_rate=4e-3, rate=3e-3, betas=(0.9, 0.98), clip=0.0, warmup=50, cooldown=0.4
)

experiment = Experiment(
    name="stage",
    dit=DiTConfig(
        dim=96,
        ffn_dim=384,
        heads=3,
        layers=4,
        text_dim=64,
        text_len=16,
        freq_dim=64,
        in_channels=48,
        out_channels=48,
        rope_theta=(1000.0, 50.0, 50.0),
        rope_pairs=(8, 4, 4),
    ),
    codec=SpaceToDepthConfig(factor=4),
    text=TextConfig(vocab=46, dim=64, dim_attn=64, dim_ffn=128, heads=2, layers=2, max_words=16),
    cache=PROFILES["stage"],
    compressor=CompressorConfig(channels=(32, 64, 128, 192)),
    sample=SampleConfig(
        steps=tuple(round(1000 - 62.5 * i) for i in range(16)),
        shift=6.0,
        exact_timesteps=True,
        prediction="clean",
    ),
    latent=(8, 8),
    fps=8,
    clip=20,
)

train = TrainConfig(
    objective="forcing",
    steps=6000,
    batch=8,
    shift=6.0,
    trainable=("dit", "compressor", "text"),
    ema=0.995,
    cover=CoverConfig(sinks=(0, 0, 0, 4, 8), gap=64.0, gap_share=0.5, matching=0.1),
    generator=MUON,
    compressor=MUON,
)
