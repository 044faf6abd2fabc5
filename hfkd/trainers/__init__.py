"""Who trains in what order: one student, rounds, a group. Each is a subclass of transformers.Trainer."""
