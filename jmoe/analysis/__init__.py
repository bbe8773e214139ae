"""What a layer or a run costs and does."""
