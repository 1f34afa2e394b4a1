"""What all scripts share: Hydra's command line, errors in one line, orderly interruption."""
