"""Other people's formats: which kind of folder this is, and the published checkpoints' names and
semantics."""
