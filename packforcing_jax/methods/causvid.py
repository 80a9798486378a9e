"""CausVid (arXiv 2412.07772): clips of 21 latent frames, each begun with the end of the one before.

Within a clip every block sees all earlier ones. A clip's last frames are its successor's first: their latents are
given, the first as the latent of an image, and committed behind nothing. The frames that overlap are shown once.
"""

from packforcing_jax.methods.method import Method

CAUSVID = Method(
    "causvid",
    "arXiv 2412.07772; tianweiy/CausVid ca21150",
    window=21,
    settings={"rope_adjustment": "none"},
    overlap=3,
)
