"""The projector losses: `reference` follows the equations in plain torch, `choice` selects an implementation."""
