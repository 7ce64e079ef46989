"""Methods of the DPO trainer, one file per paper."""
