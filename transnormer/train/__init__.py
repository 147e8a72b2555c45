"""Training: a run in one recipe, the loop, checkpoints that a kill cannot spoil, metrics and
curves."""
