"""What the trainer is made of: one stage, one step, its data, its checkpoints, its ranks."""
