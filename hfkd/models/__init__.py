"""Networks that the papers need and transformers lacks, saved under their parents' names and keys."""
