"""The projector losses: `reference` is the truth in plain torch, `ops` chooses who computes."""
