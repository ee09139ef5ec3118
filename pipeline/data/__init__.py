"""Images as the stages read them: the prepared folder, decoding, views as functions of (seed, image, view)."""
