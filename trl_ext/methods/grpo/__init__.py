"""Methods of the GRPO trainer, one file per paper."""
