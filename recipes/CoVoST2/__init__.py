"""Recipe for CoVoST 2."""
