"""The training loop of teacher and student: resumable, in one process or on several ranks."""
