"""Floor 1, one trial: its spec and record, models, data, trainers, the measuring loop and the worker."""
