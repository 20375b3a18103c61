"""Recipes: per corpus, the preparation that ends at a manifest, and the scripted study."""
