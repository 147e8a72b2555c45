"""The network: layers, token mixers, the language model made of them, and its recurrent state."""
