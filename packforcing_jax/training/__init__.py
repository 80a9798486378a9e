"""Learning: objectives, states, data, and the life of a training run."""
