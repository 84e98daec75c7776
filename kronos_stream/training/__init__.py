"""Training of the tokenizer and the predictor."""
