"""Published checkpoints in and out: names, the model that arrays imply, file formats; dense to sparse."""
