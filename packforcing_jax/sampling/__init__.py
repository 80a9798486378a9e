"""From prompts to finished blocks: schedules, the block step, the pipeline, and runs that can be stopped."""
