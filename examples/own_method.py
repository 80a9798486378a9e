"""A method of one's own: a long window without a sink, and the sink cut anew whenever the prompt changes.

.venv/bin/python examples/own_method.py
"""

import json

from packforcing_jax import Pipeline
from packforcing_jax.methods import calls
from packforcing_jax.methods.method import Method, applied
from packforcing_jax.plan import budget

PROMPTS = [
    "a red disc walks slowly before the moss curtain in scene one",
    "a blue disc walks slowly before the moss curtain in scene two",
]
forgetful = Method(
    "forgetful",
    "this file",
    sink=3,
    window=9,
    settings={"rope_adjustment": "none"},
    at_prompt_change="cut",
)


def pipeline() -> Pipeline:
    """The model that ships, under the method."""
    return Pipeline.from_pretrained(method=forgetful)


def main() -> None:
    """Samples ten blocks, and says whom each saw and what that costs."""
    model = pipeline()
    prompts = [PROMPTS[0]] * 5 + [PROMPTS[1]] * 5
    for block in model.stream(prompts):
        print(block.index, block.frames.shape, block.layout["sink"], block.layout["recent"])
    exp = applied(forgetful, model.experiment)
    numbers = [PROMPTS.index(prompt) for prompt in prompts]
    steps = [c for c in calls.calls(exp.memory, model.method, numbers) if c.call == calls.DENOISE]
    print(json.dumps([call.tokens for call in steps]))
    wrong = budget.of(exp, blocks=len(prompts)).wrong
    print(wrong or "nothing differs from its formula")


if __name__ == "__main__":
    main()
