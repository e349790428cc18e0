"""Text and tokens: the tokenizer, the chat template, and the way back to text."""
