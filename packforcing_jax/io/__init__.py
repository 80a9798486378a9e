"""Everything on disk: model folders, tensors, checkpoints, files that grow, video, public weights."""
