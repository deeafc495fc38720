"""What a model answers to questions."""
