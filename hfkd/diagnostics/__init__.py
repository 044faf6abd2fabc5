"""Questions about a run: arrays in, numbers (`metrics`) or figures (`plots`) out. Nothing here trains a model."""
