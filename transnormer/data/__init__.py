"""Text to tokens.

`documents` reads texts and `chat` conversations, `tokenizer` trains and loads byte-level BPE,
`prepare` turns documents into token shards, `shards` knows their files, and `loader` makes batches.
"""
