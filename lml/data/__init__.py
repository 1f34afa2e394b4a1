"""Image sets, prompt sets and reference statistics."""
