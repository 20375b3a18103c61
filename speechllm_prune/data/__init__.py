"""From a manifest to batches of decoder inputs. Nothing here knows which corpus a manifest comes from."""
