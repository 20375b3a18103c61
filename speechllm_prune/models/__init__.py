"""The SpeechLLM: encoder, projector, decoder and the module that joins them."""
