"""Metrics of a run, each a torchmetrics Metric fed uint8 images (B, 3, H, W)."""
