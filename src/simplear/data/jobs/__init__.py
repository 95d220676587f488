"""Work on the units of a source: tokenize, recaption, texts, a text tokenizer."""
