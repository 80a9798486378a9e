"""From prompts to finished blocks: schedules, the block step, the pipeline, runs that can be stopped and gone on with."""
