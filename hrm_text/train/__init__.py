"""Training: one loop, its optimiser, schedules, checkpoints and hooks."""
