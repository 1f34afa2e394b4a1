"""What turns seeds into images."""
