"""What a model is worth: perplexity and bits per byte."""
