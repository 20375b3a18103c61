"""LibriSpeech, and any corpus in its layout."""
