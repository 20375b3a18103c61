"""The stages: each reads files of earlier stages, does one thing, and writes its own folder, DONE.json last."""
