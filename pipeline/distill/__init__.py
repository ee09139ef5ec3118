"""Training of a student: batches, teacher features, the objective of a method, the two steps of Algorithm 1."""
