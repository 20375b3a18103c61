"""The demo: a small study from scratch, with speech synthesised and stand-in models trained on the spot."""
