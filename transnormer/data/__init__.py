"""Text to tokens: documents in (corpus), conversations (chat), byte-level BPE (tokenizer), shards and loader (loader)."""
