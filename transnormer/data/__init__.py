"""Text to tokens: documents in (corpus), byte-level BPE (tokenizer), token shards and their loader (loader)."""
