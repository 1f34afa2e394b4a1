"""A run: seeds to batches to images in a run folder; and its scores."""
