"""A run: from seeds to batches of images in a run folder, and their scores."""
